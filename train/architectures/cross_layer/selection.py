"""Find a batch's largest entries over several layers, with one layer's pre-activations in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ...kernels.entries import Entries, entries_of
from ..contract import StepInput
from ..parts.latents import DenseLatents, SparseLatents, sparse_at
from .layers import LayerInput, entries_above

_SAMPLE_ENTRIES = 1 << 20
_SAMPLE_ROWS = 64
_MARGIN = 1.5


def largest_of_batch_and_layers(inputs: Sequence[LayerInput], step: StepInput, k: int) -> list[SparseLatents]:
    """Return, by layer, the `rows * k` largest positive entries of all layers, or all positive ones if they are fewer.

    A sample of rows gives a lower bound that rarely fails. Entries above it are computed in the parameters' precision,
    and the largest of these are kept, including ties with the smallest.
    """
    n_kept = k * step.across.rows(len(inputs[0].x))
    floor = step.across.least(_bound(inputs, step, k))
    candidates = [_above(one, step, floor) for one in inputs]
    values = step.across.all_values(_positive_values(candidates))
    if len(values) < n_kept and bool(floor > 0):
        candidates = [_above(one, step, torch.zeros_like(floor)) for one in inputs]
        values = step.across.all_values(_positive_values(candidates))
    least = values.kthvalue(len(values) - n_kept + 1).values if len(values) > n_kept else values.new_zeros(())
    return [_kept(some, (some.pre_acts >= least) & (some.pre_acts > 0)) for some in candidates]


def entries_at(
    one: LayerInput, step: StepInput, indices: Int64[Tensor, " nnz"], offsets: Int64[Tensor, " batch_plus_1"]
) -> SparseLatents:
    """Return chosen entries of a layer with their pre-activations in the parameters' precision."""
    return sparse_at(step, {"W_enc": one.W_enc}, one.x, one.b_enc, Entries(indices, offsets))


def _bound(inputs: Sequence[LayerInput], step: StepInput, k: int) -> Float[Tensor, ""]:
    """Return a value, at least zero, that slightly more than k entries per row exceed in a sample of rows."""
    n_rows, n_latents = len(inputs[0].x), sum(len(one.b_enc) for one in inputs)
    stride = max(1, n_rows // min(_SAMPLE_ROWS, max(1, _SAMPLE_ENTRIES // n_latents)))
    parts = []
    for one in inputs:
        rows = one.x_compute[::stride].contiguous()
        parts.append(step.kernels.pre_activations(rows, one.W_enc_compute, one.b_enc).flatten())
    sample = torch.cat(parts)
    rank = round(_MARGIN * k * len(sample) / n_latents) + _SAMPLE_ROWS
    if rank >= len(sample):
        return sample.new_zeros(())
    return sample.kthvalue(len(sample) - rank + 1).values.clamp_min(0)


def _above(one: LayerInput, step: StepInput, floor: Float[Tensor, ""]) -> SparseLatents:
    """Return the entries of a layer above a floor."""
    threshold = floor.to(one.b_enc.dtype).expand(len(one.b_enc))
    some = entries_above(one, step, threshold)
    if isinstance(some, DenseLatents):
        return entries_at(one, step, *entries_of(some.pre_acts > floor.to(some.pre_acts.dtype)))
    return some


def _positive_values(latents: Sequence[SparseLatents]) -> Float[Tensor, " n"]:
    values = torch.cat([some.pre_acts for some in latents])
    return values[values > 0]


def _kept(latents: SparseLatents, mask: Tensor) -> SparseLatents:
    """Return the entries where a mask is true."""
    offsets = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[latents.offsets.long()]
    return SparseLatents(latents.kernels, latents.pre_acts[mask], latents.indices[mask], offsets, latents.d_sae)
