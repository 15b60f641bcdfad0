"""A batch's latents as a sparse or a dense matrix, with the same operations on both.

An architecture is written once in terms of entries: elementwise operations on `pre_acts`, and these methods for sums
over rows or latents. Sparse entries use the four sparse operations. Dense ones, for SAEs early in training whose
latents fire nearly everywhere, use matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from ...kernels.backend import Backend
from ...kernels.encoder import Encoder, subtract_encoded
from ...kernels.entries import DenseEntries, Entries, EntryValues, Selection, entries_of
from ...kernels.gradient import Gradient
from ..contract import Batch, Parameters, StepInput
from .dense import cast, encoder_transpose_times, product, sum_of_rows

SPARSE_BELOW = 1 / 16
# The pre-activation of unused entries in a buffer: below every threshold, but finite.
_NO_ENTRY = -1e20


@dataclass(frozen=True)
class SparseLatents:
    """Entries in CSR by row, with their `pre_acts` in the parameters' precision.

    Entries from `offsets[-1]` on may be unused; `fixed` then says that shapes must not change.
    """

    kernels: Backend
    pre_acts: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]
    d_sae: int
    fixed: bool = False
    csc: Any = None

    @classmethod
    def of(cls, kernels: Backend, entries: EntryValues, d_sae: int) -> SparseLatents:
        """Return the entries that a backend chose."""
        return cls(kernels, entries.pre_acts, entries.indices, entries.offsets, d_sae, csc=entries.csc)

    @cached_property
    def by_latent(self) -> Any:
        """The entries' order by latent, as `Backend.to_csc` returns it, computed once for all sums."""
        return self.kernels.to_csc(self.indices, self.offsets, self.d_sae) if self.csc is None else self.csc

    def spread(self, by_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """Return, for each entry, the value of its latent."""
        return by_latent.index_select(0, self.indices)

    def sum(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        """Sum values by latent."""
        return self.kernels.sum_by_latent(values, self.indices, self.offsets, self.d_sae, self.by_latent)

    def decode(self, values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_out"]) -> Tensor:
        """Return the reconstruction, without bias."""
        return self.kernels.decode(values, self.indices, self.offsets, W_dec)

    def grad_values(self, g: Float[Tensor, "batch d_out"], W_dec: Float[Tensor, "d_sae d_out"]) -> Tensor:
        """Return the gradient with respect to each entry's value."""
        return self.kernels.grad_values(g, W_dec, self.indices, self.offsets, self.csc)

    def grad_weights(self, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d"]) -> Float[Tensor, "d_sae d"]:
        """Return `values^T g`."""
        return self.kernels.grad_weights(values, self.indices, self.offsets, g, self.d_sae, self.by_latent)

    def grad_weights_and_bias(
        self, values: Float[Tensor, " nnz"], g: Float[Tensor, "batch d"]
    ) -> tuple[Tensor, Tensor]:
        """Return `values^T g` and the values' sum by latent."""
        return self.kernels.grad_weights_and_bias(values, self.indices, self.offsets, g, self.d_sae, self.by_latent)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Return which latents have a positive entry, without waiting for the device."""
        fired = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=self.indices.device)
        return fired.index_fill_(0, self.indices.long().where(self.pre_acts > 0, self.d_sae), True)[: self.d_sae]

    def columns(self, start: int, stop: int) -> tuple[SparseLatents, Tensor]:
        """Return the entries of latents [start, stop), renumbered from 0, and the indices of these entries."""
        if self.fixed:
            return self._columns_within(start, stop)
        chosen = ((self.indices >= start) & (self.indices < stop)).nonzero().squeeze(1)
        offsets = torch.searchsorted(chosen, self.offsets)
        part = SparseLatents(self.kernels, self.pre_acts[chosen], self.indices[chosen] - start, offsets, stop - start)
        return part, chosen

    def _columns_within(self, start: int, stop: int) -> tuple[SparseLatents, Tensor]:
        """Do the same as `columns` in buffers for all entries; the indices of unused entries are past the end."""
        n = len(self.indices)
        entries = torch.arange(n, device=self.indices.device)
        inside = (self.indices >= start) & (self.indices < stop) & (entries < self.offsets[-1])
        before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
        # Entries inside keep their order; all others are written to one index past the end.
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
        """Return the gradient with respect to each entry's value."""
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


def encoder_of(step: StepInput, parameters: Parameters, centred: bool) -> Encoder:
    """Return the encoder as selections read it; only a `centred` one subtracts `b_dec`."""
    W_enc, b_dec = parameters["W_enc"], parameters["b_dec"]
    subtracted = b_dec if centred else b_dec.new_zeros(W_enc.shape[1])
    return Encoder(W_enc, parameters["b_enc"], subtracted, step.W_enc_compute)


def encoded_bias(parameters: Parameters, centred: bool, bias: str = "b_enc") -> Float[Tensor, " d_sae"]:
    """Return the bias to add to `W_enc x` for pre-activations.

    They are `W_enc (x - b_dec) + b_enc` if the encoder is `centred`, otherwise `W_enc x + b_enc`.
    """
    return subtract_encoded(parameters[bias], parameters["W_enc"], parameters["b_dec"]) if centred else parameters[bias]


def sparse_at(
    step: StepInput,
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    bias: Float[Tensor, " d_sae"],
    entries: Entries,
) -> SparseLatents:
    """Return chosen entries with their pre-activations computed in the parameters' precision."""
    return SparseLatents.of(step.kernels, step.kernels.values_at(x, parameters["W_enc"], bias, entries), len(bias))


def largest_of_rows(step: StepInput, parameters: Parameters, batch: Batch, k: int, centred: bool) -> SparseLatents:
    """Return each row's k largest pre-activations, positive or not, as `Backend.largest_of_rows` chooses them."""
    encoder = encoder_of(step, parameters, centred)
    found = step.kernels.largest_of_rows(encoder, batch.x, batch.x_compute, k)
    return SparseLatents.of(step.kernels, found, len(encoder.b_enc))


def row_largest_of_all_ranks(
    step: StepInput, parameters: Parameters, batch: Batch, k: int, centred: bool
) -> SparseLatents:
    """Return the entries here, of the latents of this rank, that are positive and among each row's k largest of all."""
    bias = encoded_bias(parameters, centred)
    acts, top = step.kernels.select_topk(batch.x_compute, step.W_enc_compute, bias, min(k, len(bias)))
    columns, offsets = entries_of(step.across.only_largest(acts, k) > 0)
    rows = torch.repeat_interleave(torch.arange(len(top), device=top.device), offsets.diff())
    return sparse_at(step, parameters, batch.x, bias, Entries(top[rows, columns], offsets))


def sparse_within(
    step: StepInput,
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    bias: Float[Tensor, " d_sae"],
    chosen: Selection,
) -> SparseLatents:
    """Return entries in a buffer of a fixed size, with their pre-activations in the parameters' precision."""
    _, indices, offsets = chosen
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
    """Return the pre-activations above a threshold: sparse if they are few, otherwise all of them, dense.

    Counting them waits for the device, unless the step has a capacity for entries.
    """
    room, fixed_shapes = step.room, step.kernels.fixed_shapes
    x, W_enc = batch.x_compute, step.W_enc_compute
    if room is not None and room.capacity is not None and fixed_shapes is not None:
        found = fixed_shapes.select_threshold(x, W_enc, bias, threshold, room.capacity)
        room.found(found.offsets[-1])
        return sparse_within(step, parameters, batch.x, bias, found)
    entries = step.kernels.entries_above(x, W_enc, bias, threshold, SPARSE_BELOW)
    if isinstance(entries, DenseEntries):
        if room is not None:
            room.counted(entries.n_chosen)
        return DenseLatents(entries.pre_acts, batch.x.dtype)
    if room is not None:
        room.counted(len(entries.indices))
    return sparse_at(step, parameters, batch.x, bias, entries)


def scatter_add_rows(out: Float[Tensor, "d_sae d"], indices: Int[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
    """Add rows in place, in the same order every time: on CUDA `index_add_` does not, `index_put_` sorts."""
    if out.is_cuda:
        out.index_put_((indices.long(),), rows, accumulate=True)
    else:
        out.index_add_(0, indices, rows)


def count(mask: Tensor) -> Float[Tensor, ""]:
    """Return the number of true entries, on the device."""
    return torch.count_nonzero(mask).double()


def gradients_of(
    parameters: Parameters,
    latents: Latents,
    x: Float[Tensor, "batch d_in"],
    g: Float[Tensor, "batch d_out"],
    values: Tensor,
    by_pre_acts: Tensor,
    centred: bool,
) -> Parameters:
    """Return the gradients of all parameters; if the encoder is `centred`, including those through `x - b_dec`.

    `g` is the loss's gradient with respect to the reconstruction, `by_pre_acts` that with respect to the
    pre-activations.
    """
    W_enc, b_enc = latents.grad_weights_and_bias(by_pre_acts, x)
    # A sum in another order would round differently and change the weights of transcoders from release to release.
    by_b_dec = sum_of_rows(g) if centred else g.sum(0)
    if centred:
        W_enc.addr_(b_enc, parameters["b_dec"], alpha=-1)
        by_b_dec.sub_(encoder_transpose_times(parameters["W_enc"], b_enc))
    skip = {"W_skip": product(g.T, x)} if "W_skip" in parameters else {}
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": latents.grad_weights(values, g), "b_dec": by_b_dec, **skip}


def scaled_gradients_of(
    step: StepInput,
    parameters: Parameters,
    latents: SparseLatents,
    batch: Batch,
    error: Float[Tensor, "batch d_out"],
    values: Float[Tensor, " nnz"],
    by_pre_acts: Float[Tensor, " nnz"],
    scale: float,
    centred: bool,
) -> dict[str, Gradient]:
    """Return `gradients_of` for `g = scale * error`, without forming that product.

    With `step.W_dec_compute`, a backend that supports it defers the gradients of `W_enc` and `W_dec` until the
    optimizer reads them, and computes them from terms in the compute dtype. Latents may be on several ranks.
    """
    values, b_dec = values * scale, parameters["b_dec"]
    by_b_dec = sum_of_rows(error) * scale
    deferred = step.kernels.deferred_gradient if step.W_dec_compute is not None else None
    W_enc: Gradient
    if deferred is not None:
        b_enc = latents.sum(by_pre_acts)
        W_enc = deferred(latents.by_latent, by_pre_acts, batch.x_compute)
        if centred:
            W_enc.add_outer(b_enc, b_dec, alpha=-1)
        W_dec = deferred(latents.by_latent, values, cast(error, batch.x_compute.dtype))
    else:
        W_enc, b_enc = latents.grad_weights_and_bias(by_pre_acts, batch.x)
        if centred:
            W_enc.addr_(b_enc, b_dec, alpha=-1)
        W_dec = latents.grad_weights(values, error)
    if centred:
        by_b_dec -= step.across.over_latents(encoder_transpose_times(parameters["W_enc"], b_enc))
    skip = {"W_skip": product(error.T, batch.x) * scale} if "W_skip" in parameters else {}
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": by_b_dec, **skip}
