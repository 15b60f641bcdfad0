"""BatchTopK: the batch * k largest latents of a whole batch (arXiv 2412.06410)."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.sae import Sae
from ..stream.normalization import Normalization
from .contract import SINGLE_PROCESS, Batch, Buffers, Collectives, Parameters, StepInput
from .parts.decoder_norms import NORM_TOLERANCE
from .parts.latents import SparseLatents, csr_of, encoded_bias, sparse_at, sparse_within
from .registry import register
from .topk import CompetingConfig, LargestConfig, TopK

MOMENTUM = 0.95
_SAMPLE = 1 << 16
_LEAST_CAPACITY = 1024


class BatchTopKConfig(CompetingConfig, frozen=True, kw_only=True):
    """BatchTopK: the batch * k largest latents of a whole batch (arXiv 2412.06410)."""

    architecture: Literal["batch_topk"] = "batch_topk"


L = TypeVar("L", bound=LargestConfig)


@register(BatchTopKConfig)
class BatchTopK(TopK[L]):
    """Keeps the `batch * k` largest of `ReLU(W_enc (x - b_dec) + b_enc)`, with TopK's loss and AuxK.

    Saved as a JumpReLU SAE whose one threshold is the running mean of each batch's smallest kept latent.
    """

    saved_as = "jumprelu"
    capturable = True
    betas = (0.9, 0.99)
    default_lr = 3e-4

    def initial_buffers(self) -> Buffers:
        """Return the running threshold, negative until the first batch sets it."""
        return {"threshold": torch.tensor(-1.0)}

    def select(self, parameters: Parameters, batch: Batch, step: StepInput) -> SparseLatents:
        """Return the chosen entries and update the running threshold."""
        bias, k = encoded_bias(parameters), int(self.config.k or 0)
        latents = within_room(step, parameters, batch, bias, k)
        if latents is None:
            pre_acts = step.kernels.pre_activations(batch.x_compute, step.W_enc_compute, bias)
            by_groups = step.across is SINGLE_PROCESS and hasattr(step.kernels, "largest_of_batch")
            entries = step.kernels.largest_of_batch(pre_acts, k * len(pre_acts)) if by_groups else None
            if entries is None:
                lowest = batch_threshold(pre_acts, k * step.across.rows(len(pre_acts)), step.across)
                entries = csr_of(pre_acts >= lowest)
            latents = sparse_at(step, parameters, batch.x, bias, *entries)
        positive = latents.pre_acts.where(latents.pre_acts > 0, torch.inf)
        smallest = positive.amin().float() if len(positive) else positive.new_full((), torch.inf, dtype=torch.float32)
        smallest, threshold = step.across.least(smallest), step.buffers["threshold"]
        moved = torch.where(threshold < 0, smallest, torch.lerp(smallest, threshold, MOMENTUM))
        threshold.copy_(torch.where(torch.isfinite(smallest), moved, threshold))
        return latents

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return a JumpReLU SAE with the same threshold for every latent."""
        threshold = buffers["threshold"].clamp_min(0) / normalization.scale
        return super().exported(parameters, buffers, normalization) | {"threshold": threshold.repeat(self.d_sae)}

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters, and the mean of the SAE's thresholds as the running threshold."""
        parameters, _ = super().imported(sae, normalization)
        return parameters, {"threshold": (self._held(sae)["threshold"] * normalization.scale).mean()}

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report thresholds that are averaged."""
        found, thresholds = super().differences(sae, normalization), self._held(sae)["threshold"]
        least, mean, most = (float(value) for value in (thresholds.min(), thresholds.mean(), thresholds.max()))
        if most - least > NORM_TOLERANCE * abs(mean):
            found.append(f"its thresholds, {least:.3g} to {most:.3g}, become one, their mean of {mean:.3g}")
        return found


def within_room(
    step: StepInput, parameters: Parameters, batch: Batch, bias: Float[Tensor, " d_sae"], k: int
) -> SparseLatents | None:
    """Return the batch's largest latents found without waiting for the device, or None where they are not to be.

    Candidates are those above a value that a sample of rows gives. Where they do not suffice, or do not fit, the step
    is not certified, and its room keeps it from changing anything.
    """
    room, rows = step.room, len(batch.x)
    if room is None or room.exact:
        if room is not None:
            room.waited = True
        return None
    x, W_enc = batch.x_compute, step.W_enc_compute
    floor = step.kernels.batch_floor(x, W_enc, bias, k, 1 + room.margin / 4)
    capacity = min((1 + room.margin) * k * rows + _LEAST_CAPACITY, rows * len(bias))
    chosen, _, certified = step.kernels.select_batch_topk(x, W_enc, bias, k, floor, capacity)
    room.certify(certified)
    return sparse_within(step, parameters, batch.x, bias, chosen)


def batch_threshold(
    pre_acts: Float[Tensor, "batch d_sae"], n_kept: int, across: Collectives = SINGLE_PROCESS
) -> Tensor:
    """Return the `n_kept`-th largest pre-activation of all ranks, or the smallest positive one if fewer are positive.

    A sample gives a bound that rarely fails to lie below it, so that only entries above that are ranked.
    """
    flat = pre_acts.reshape(-1)
    stride = max(1, len(flat) // _SAMPLE)
    sample = flat[::stride]
    rank = 2 * n_kept * len(pre_acts) // across.rows(len(pre_acts)) // stride + 64
    bound = sample.kthvalue(len(sample) - rank + 1).values if rank < len(sample) else flat.new_zeros(())
    candidates = across.all_values(flat[flat >= across.least(bound).clamp_min(0)])
    if len(candidates) < n_kept:
        candidates = across.all_values(flat[flat > 0])
    candidates = candidates[candidates > 0]
    if len(candidates) <= n_kept:
        return candidates.min() if len(candidates) else flat.new_full((), torch.inf)
    return candidates.kthvalue(len(candidates) - n_kept + 1).values
