"""A batch's latents as a sparse or a dense matrix, with the same operations on both.

An architecture is written once over entries: elementwise work on `pre_acts` and values made from
them, and these methods for what crosses rows and latents. Sparse entries go through the four sparse
operations; dense ones, for young SAEs that fire nearly everywhere, through matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...architectures.contract import SINGLE_PROCESS, Collectives
from ..contract import Batch, Parameters, StepInput
from .dense import cast, encoder_transpose_times, product, subtract_encoded, sum_of_rows

SPARSE_BELOW = 1 / 16
# Where there is room for more entries than there are, this is below every threshold and yet a number.
_NO_ENTRY = -1e20


@dataclass(frozen=True)
class SparseLatents:
    """Entries in CSR by row; `pre_acts` are theirs, in the parameters' precision.

    From `offsets[-1]` on there may be room that no entry takes: `fixed` then says that shapes are to stay as they are.
    """

    kernels: Any
    pre_acts: Float[Tensor, " nnz"]
    indices: Int64[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]
    d_sae: int
    fixed: bool = False
    csc: Any = None

    @cached_property
    def _csc(self) -> tuple[Any, ...]:
        """Return the entries' order by latent, where the backend can share it between calls."""
        if self.csc is not None:
            return (self.csc,)
        if not hasattr(self.kernels, "to_csc"):
            return ()
        return (self.kernels.to_csc(self.indices, self.offsets, self.d_sae),)

    def spread(self, by_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """Return each entry's latent's value."""
        return by_latent.index_select(0, self.indices)

    def sum(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        """Sum values by latent."""
        return self.kernels.sum_by_latent(values, self.indices, self.offsets, self.d_sae, *self._csc)

    def decode(self, values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_out"]) -> Tensor:
        """Return the reconstruction, without bias."""
        return self.kernels.decode(values, self.indices, self.offsets, W_dec)

    def grad_values(self, g: Float[Tensor, "batch d_out"], W_dec: Float[Tensor, "d_sae d_out"]) -> Tensor:
        """Return the gradient by each entry's value."""
        by_latent = () if self.csc is None else (self.csc,)
        return self.kernels.grad_values(g, W_dec, self.indices, self.offsets, *by_latent)

    def grad_weights(self, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d"]) -> Float[Tensor, "d_sae d"]:
        """Return `values^T g`."""
        return self.kernels.grad_weights(values, self.indices, self.offsets, g, self.d_sae, *self._csc)

    def grad_weights_and_bias(
        self, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d"]
    ) -> tuple[Tensor, Tensor]:
        """Return `values^T g` and the values' sum by latent."""
        return self.kernels.grad_weights_and_bias(values, self.indices, self.offsets, g, self.d_sae, *self._csc)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Return which latents have a positive entry, without asking the device how many."""
        fired = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=self.indices.device)
        return fired.index_fill_(0, self.indices.long().where(self.pre_acts > 0, self.d_sae), True)[: self.d_sae]

    def columns(self, start: int, stop: int) -> tuple[SparseLatents, Tensor]:
        """Return the entries of latents [start, stop), renumbered from 0, and which entries they are."""
        if self.fixed:
            return self._columns_within(start, stop)
        chosen = ((self.indices >= start) & (self.indices < stop)).nonzero().squeeze(1)
        offsets = torch.searchsorted(chosen, self.offsets)
        part = SparseLatents(self.kernels, self.pre_acts[chosen], self.indices[chosen] - start, offsets, stop - start)
        return part, chosen

    def _columns_within(self, start: int, stop: int) -> tuple[SparseLatents, Tensor]:
        """Do as `columns`, in as much room as all entries have; the rest of it is said to be of an entry past it."""
        n = len(self.indices)
        entries = torch.arange(n, device=self.indices.device)
        inside = (self.indices >= start) & (self.indices < stop) & (entries < self.offsets[-1])
        before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
        # Entries inside keep their order; the others all land in one place past the end.
        target = torch.where(inside, before[:-1], n)
        chosen = entries.new_full((n + 1,), n).scatter_(0, target, entries)[:n]
        pre_acts = self.pre_acts.new_full((n + 1,), _NO_ENTRY).scatter_(0, target, self.pre_acts)[:n]
        indices = self.indices.new_zeros(n + 1).scatter_(0, target, self.indices - start)[:n]
        offsets = before[self.offsets.clamp(max=n)]
        return SparseLatents(self.kernels, pre_acts, indices, offsets, stop - start, fixed=True), chosen


@dataclass(frozen=True)
class DenseLatents:
    """All pre-activations, in the compute dtype, and the batch in that dtype."""

    pre_acts: Float[Tensor, "batch d_sae"]
    precise: torch.dtype

    def spread(self, by_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """Return the values by latent, to broadcast over rows."""
        return by_latent.to(self.pre_acts.dtype)

    def sum(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
        """Sum values by latent."""
        return values.sum(0, dtype=self.precise)

    def decode(self, values: Float[Tensor, "batch d_sae"], W_dec: Float[Tensor, "d_sae d_out"]) -> Tensor:
        """Return the reconstruction, without bias."""
        return product(values, W_dec.to(values.dtype)).to(self.precise)

    def grad_values(self, g: Float[Tensor, "batch d_out"], W_dec: Float[Tensor, "d_sae d_out"]) -> Tensor:
        """Return the gradient by each entry's value."""
        return product(g.to(self.pre_acts.dtype), W_dec.to(self.pre_acts.dtype).T)

    def grad_weights(self, values: Float[Tensor, "batch d_sae"], g: Float[Tensor, "batch d"]) -> Tensor:
        """Return `values^T g`."""
        return product(values.T, g.to(values.dtype)).to(self.precise)

    def grad_weights_and_bias(
        self, values: Float[Tensor, "batch d_sae"], g: Float[Tensor, "batch d"]
    ) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, " d_sae"]]:
        """Return `values^T g` and the values' sum by latent."""
        return self.grad_weights(values, g), self.sum(values)


Latents = SparseLatents | DenseLatents


def encoded_bias(parameters: Parameters, bias: str = "b_enc") -> Float[Tensor, " d_sae"]:
    """Return the bias that turns `W_enc (x - b_dec) + b_enc` into `W_enc x + bias`."""
    return subtract_encoded(parameters[bias], parameters["W_enc"], parameters["b_dec"])


def sparse_at(
    step: StepInput, parameters: Parameters, x: Tensor, bias: Tensor, indices: Tensor, offsets: Tensor
) -> SparseLatents:
    """Return chosen entries with their pre-activations computed in the parameters' precision."""
    kernels = step.kernels
    csc = kernels.to_csc(indices, offsets, len(bias)) if hasattr(kernels, "WeightGradient") else None
    by_latent = () if csc is None else (csc,)
    pre_acts = kernels.grad_values(x, parameters["W_enc"], indices, offsets, *by_latent).add_(
        bias.index_select(0, indices)
    )
    return SparseLatents(kernels, pre_acts, indices, offsets, len(bias), csc=csc)


def largest_of_rows(step: StepInput, parameters: Parameters, batch: Batch, k: int) -> SparseLatents:
    """Return each row's k largest pre-activations, positive or not.

    They are chosen from a product in the compute dtype; or, where the backend has a faster way and it applies, they
    are the largest in the parameters' precision, and in place of some that are not positive stand zeros of any latents.
    """
    kernels, W_enc = step.kernels, parameters["W_enc"]
    offsets = torch.arange(0, len(batch.x) * k + 1, k, device=batch.x.device)
    if hasattr(kernels, "screened_topk") and batch.x_compute.dtype is not batch.x.dtype:
        found = kernels.screened_topk(batch.x, W_enc, parameters["b_enc"], parameters["b_dec"], k)
        if found is not None:
            pre_acts, indices = (entries.view(-1) for entries in found)
            csc = kernels.to_csc(indices, offsets, len(W_enc))
            return SparseLatents(kernels, pre_acts, indices, offsets, len(W_enc), csc=csc)
    bias = encoded_bias(parameters)
    _, top = kernels.select_topk(batch.x_compute, step.W_enc_compute, bias, k)
    return sparse_at(step, parameters, batch.x, bias, top.reshape(-1), offsets)


def sparse_within(step: StepInput, parameters: Parameters, x: Tensor, bias: Tensor, chosen: Any) -> SparseLatents:
    """Return entries that have room of a fixed size, with their pre-activations in the parameters' precision."""
    indices, offsets = chosen.indices, chosen.offsets
    pre_acts = step.kernels.grad_values(x, parameters["W_enc"], indices, offsets).add_(bias.index_select(0, indices))
    there = torch.arange(len(indices), device=indices.device) < offsets[-1]
    return SparseLatents(step.kernels, pre_acts.where(there, _NO_ENTRY), indices, offsets, len(bias), fixed=True)


def above_threshold(
    step: StepInput,
    parameters: Parameters,
    batch: Batch,
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"] | float = 0.0,
) -> Latents:
    """Return the pre-activations above a threshold, sparse if few are, or else all of them, dense.

    How many there are is asked of the device, unless the step has room for them.
    """
    room = step.room
    x, W_enc = batch.x_compute, step.W_enc_compute
    if room is not None and room.capacity is not None:
        found = step.kernels.select_threshold(x, W_enc, bias, threshold, room.capacity)
        room.found(found.offsets[-1])
        return sparse_within(step, parameters, batch.x, bias, found)
    if hasattr(step.kernels, "entries_above"):
        entries = step.kernels.entries_above(x, W_enc, bias, threshold, SPARSE_BELOW)
        if entries is not None:
            return sparse_at(step, parameters, batch.x, bias, *entries)
    pre_acts = step.kernels.pre_activations(x, W_enc, bias)
    if isinstance(threshold, Tensor):
        threshold = threshold.to(pre_acts.dtype)
    chosen = pre_acts > threshold
    n_chosen = int(torch.count_nonzero(chosen))
    if room is not None:
        room.counted(n_chosen)
    if n_chosen >= SPARSE_BELOW * chosen.numel():
        return DenseLatents(pre_acts, batch.x.dtype)
    return sparse_at(step, parameters, batch.x, bias, *csr_of(chosen))


def csr_of(chosen: Tensor) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " batch_plus_1"]]:
    """Return the indices and offsets of a boolean matrix's true entries."""
    rows, indices = chosen.nonzero(as_tuple=True)
    offsets = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(torch.bincount(rows, minlength=len(chosen)), 0, out=offsets[1:])
    return indices, offsets


def add_rows(out: Float[Tensor, "d_sae d"], indices: Int64[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
    """Add rows in place, in the same order every time: on CUDA `index_add_` does not, `index_put_` sorts."""
    if out.is_cuda:
        out.index_put_((indices.long(),), rows, accumulate=True)
    else:
        out.index_add_(0, indices, rows)


def count(mask: Tensor) -> Float[Tensor, ""]:
    """Return how many are true, on the device."""
    return torch.count_nonzero(mask).double()


def gradients_of(
    parameters: Parameters,
    latents: Latents,
    x: Float[Tensor, "batch d_in"],
    g: Float[Tensor, "batch d_in"],
    values: Tensor,
    by_pre_acts: Tensor,
    across: Collectives = SINGLE_PROCESS,
    x_compute: Float[Tensor, "batch d_in"] | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Return the gradients of all parameters, that through the centring `x - b_dec` included.

    `scale g` is the loss's gradient by the reconstruction, `by_pre_acts` that by the pre-activations. With
    `x_compute`, sparse latents on a CPU leave the weights' gradients to be computed in that precision, block by
    block, by the optimizer: they are then `WeightGradient`s.
    """
    values = values if scale == 1.0 else values * scale
    by_b_dec = sum_of_rows(g) * scale
    if x_compute is not None and isinstance(latents, SparseLatents) and latents.csc is not None:
        by_blocks = latents.kernels.WeightGradient
        b_enc = latents.sum(by_pre_acts)
        W_enc = by_blocks(latents.csc, by_pre_acts, x_compute)
        W_enc.add_outer(b_enc, parameters["b_dec"], alpha=-1)
        W_dec = by_blocks(latents.csc, values, cast(g, x_compute.dtype))
    else:
        W_enc, b_enc = latents.grad_weights_and_bias(by_pre_acts, x)
        W_enc.addr_(b_enc, parameters["b_dec"], alpha=-1)
        W_dec = latents.grad_weights(values, g)
    by_b_dec -= across.over_latents(encoder_transpose_times(parameters["W_enc"], b_enc))
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": by_b_dec}


def add_to_rows(gradient: Any, latents: Int64[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
    """Add rows to a weight's gradient, whether it is there or computed by blocks; `latents` ascend."""
    if isinstance(gradient, Tensor):
        gradient[latents] += rows
    else:
        gradient.add_rows(latents, rows)
