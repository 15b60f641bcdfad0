"""BatchTopK: the batch * k largest latents of a whole batch (arXiv 2412.06410)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..normalization import Normalization
from ..parallel.across import ALONE, Across
from .base import Batch, Buffers, Parameters, StepInput
from .latents import SparseLatents, csr_of, encoded_bias, sparse_at
from .topk import TopK

_MOMENTUM = 0.95
_SAMPLE = 1 << 16


class BatchTopK(TopK):
    """Keeps the `batch * k` largest of `ReLU(W_enc (x - b_dec) + b_enc)`, with TopK's loss and AuxK.

    Saved as a JumpReLU SAE whose one threshold is the running mean of each batch's smallest kept latent.
    """

    name = "batch_topk"
    betas = (0.9, 0.99)
    default_lr = 3e-4

    def initial_buffers(self) -> Buffers:
        """Return the running threshold, negative until the first batch sets it."""
        return {"threshold": torch.tensor(-1.0)}

    def select(self, parameters: Parameters, batch: Batch, step: StepInput) -> SparseLatents:
        """Return the chosen entries and update the running threshold."""
        bias = encoded_bias(parameters)
        pre_acts = step.kernels.pre_activations(batch.x_compute, step.W_enc_compute, bias)
        n_kept = int(self.config.k or 0) * step.across.rows(len(pre_acts))
        lowest = batch_threshold(pre_acts, n_kept, step.across)
        latents = sparse_at(step, parameters, batch.x, bias, *csr_of(pre_acts >= lowest))
        positive = latents.pre_acts[latents.pre_acts > 0]
        smallest = positive.amin().float() if len(positive) else positive.new_full((), torch.inf, dtype=torch.float32)
        smallest, threshold = step.across.least(smallest), step.buffers["threshold"]
        if torch.isfinite(smallest):
            threshold.copy_(smallest if threshold < 0 else torch.lerp(smallest, threshold, _MOMENTUM))
        return latents

    def exported(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization
    ) -> tuple[str, dict[str, Tensor]]:
        """Return a JumpReLU SAE with the same threshold for every latent."""
        _, tensors = super().exported(parameters, buffers, normalization)
        threshold = buffers["threshold"].clamp_min(0) / normalization.scale
        return "jumprelu", tensors | {"threshold": threshold.repeat(self.d_sae)}


def batch_threshold(pre_acts: Float[Tensor, "batch d_sae"], n_kept: int, across: Across = ALONE) -> Tensor:
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
