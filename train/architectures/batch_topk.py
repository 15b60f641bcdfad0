"""BatchTopK: the batch * k largest latents of a whole batch (arXiv 2412.06410)."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.sae import Sae
from ..kernels.entries import Entries, batch_threshold, entries_of
from ..stream.normalization import Normalization
from .contract import SINGLE_PROCESS, Batch, Buffers, Parameters, StepInput
from .parts.decoder_norms import NORM_TOLERANCE
from .parts.latents import SparseLatents, encoded_bias, sparse_at, sparse_within
from .registry import register
from .topk import CompetingConfig, LargestConfig, TopK

MOMENTUM = 0.95
_LEAST_CAPACITY = 1024


class BatchTopKConfig(CompetingConfig, frozen=True, kw_only=True):
    """BatchTopK: the batch * k largest latents of a whole batch (arXiv 2412.06410)."""

    architecture: Literal["batch_topk"] = "batch_topk"


_L = TypeVar("_L", bound=LargestConfig)


@register(BatchTopKConfig)
class BatchTopK(TopK[_L]):
    """Keeps the `batch * k` largest of `ReLU(W_enc (x - b_dec) + b_enc)`, with TopK's loss and AuxK.

    Saved as a JumpReLU SAE whose one threshold is the running mean of each batch's smallest kept latent.
    """

    saved_as = "jumprelu"
    capturable = True
    shardable = True
    betas = (0.9, 0.99)
    default_lr = 3e-4

    def initial_buffers(self) -> Buffers:
        """Return the running threshold, negative until the first batch sets it."""
        return {"threshold": torch.tensor(-1.0)}

    def select(self, parameters: Parameters, batch: Batch, step: StepInput) -> SparseLatents:
        """Return the chosen entries and update the running threshold."""
        bias, k = encoded_bias(parameters, self.centred), int(self.config.k or 0)
        latents = within_room(step, parameters, batch, bias, k)
        if latents is None:
            pre_acts = step.kernels.pre_activations(batch.x_compute, step.W_enc_compute, bias)
            latents = sparse_at(step, parameters, batch.x, bias, batch_largest_of_all_ranks(step, pre_acts, k))
        positive = latents.pre_acts.where(latents.pre_acts > 0, torch.inf)
        smallest = positive.amin().float() if len(positive) else positive.new_full((), torch.inf, dtype=torch.float32)
        smallest, threshold = step.across.least(smallest), step.buffers["threshold"]
        moved = torch.where(threshold < 0, smallest, torch.lerp(smallest, threshold, MOMENTUM))
        threshold.copy_(torch.where(torch.isfinite(smallest), moved, threshold))
        return latents

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return a JumpReLU SAE with the same threshold for every latent."""
        threshold = buffers["threshold"].clamp_min(0) / self.latent_unit(normalization)
        return super().exported(parameters, buffers, normalization) | {"threshold": threshold.repeat(self.d_sae)}

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters, and the mean of the SAE's thresholds as the running threshold."""
        parameters, _ = super().imported(sae, normalization)
        return parameters, {"threshold": self.held(sae, normalization)["threshold"].mean()}

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report thresholds that are averaged."""
        found = super().differences(sae, normalization)
        thresholds = self.held(sae, normalization)["threshold"] / self.latent_unit(normalization)
        least, mean, most = (float(value) for value in (thresholds.min(), thresholds.mean(), thresholds.max()))
        if most - least > NORM_TOLERANCE * abs(mean):
            found.append(f"its thresholds, {least:.3g} to {most:.3g}, become one, their mean of {mean:.3g}")
        return found


def batch_largest_of_all_ranks(step: StepInput, pre_acts: Float[Tensor, "batch d_sae"], k: int) -> Entries:
    """Return which pre-activations here are among the `batch * k` largest positive ones of all ranks."""
    n, across = len(pre_acts), step.across
    if across is SINGLE_PROCESS:
        return step.kernels.largest_of_batch(pre_acts, k * n)
    n_kept, n_slices = k * across.rows(n), across.rows(n) // n
    return entries_of(pre_acts >= batch_threshold(pre_acts, n_kept, n_slices, across.least, across.all_values))


def within_room(
    step: StepInput, parameters: Parameters, batch: Batch, bias: Float[Tensor, " d_sae"], k: int
) -> SparseLatents | None:
    """Return the batch's largest latents without waiting for the device, or None if that is not possible.

    Candidates are the entries above a value estimated from a sample of rows. If they are too few, or do not fit, the
    step is not certified, and `room` suppresses its update.
    """
    room, fixed_shapes, rows = step.room, step.kernels.fixed_shapes, len(batch.x)
    if room is None or room.exact or fixed_shapes is None:
        if room is not None:
            room.waited = True
        return None
    x, W_enc = batch.x_compute, step.W_enc_compute
    floor = fixed_shapes.batch_floor(x, W_enc, bias, k, 1 + room.margin / 4)
    capacity = min((1 + room.margin) * k * rows + _LEAST_CAPACITY, rows * len(bias))
    chosen, _, certified = fixed_shapes.select_batch_topk(x, W_enc, bias, k, floor, capacity)
    room.certify(certified)
    return sparse_within(step, parameters, batch.x, bias, chosen)
