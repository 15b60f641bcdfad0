"""The CPU backend: products in row blocks on all cores, selections by groups' maxima, `embedding_bag` for sums."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..backend import Backend
from ..encoder import Encoder
from ..entries import DenseEntries, Entries, EntryValues
from .csc import to_csc
from .encode import pre_activations, search_above, select_topk
from .gradient import WeightGradient
from .rows import dequantise, normalise
from .screen import screened_topk
from .sparse_ops import decode, grad_values, grad_weights, grad_weights_and_bias, sum_by_latent
from .threshold import largest_of_batch
from .topk import topk_of_rows


class Cpu(Backend):
    """The operations on a CPU. Entries are sorted by latent when they are computed, once for all later operations."""

    name = "cpu"
    deferred_gradient = WeightGradient
    pre_activations = staticmethod(pre_activations)
    select_topk = staticmethod(select_topk)
    decode = staticmethod(decode)
    grad_values = staticmethod(grad_values)
    grad_weights = staticmethod(grad_weights)
    grad_weights_and_bias = staticmethod(grad_weights_and_bias)
    sum_by_latent = staticmethod(sum_by_latent)
    to_csc = staticmethod(to_csc)
    topk_of_rows = staticmethod(topk_of_rows)
    normalise = staticmethod(normalise)
    dequantise = staticmethod(dequantise)

    def values_at(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        entries: Entries,
    ) -> EntryValues:
        """Compute `W_enc x + bias` for the chosen entries only, sorted by latent."""
        csc = self.to_csc(*entries, len(bias))
        pre_acts = self.grad_values(x, W_enc, *entries, csc)
        return EntryValues(pre_acts.add_(bias.index_select(0, entries.indices)), *entries, csc)

    def largest_of_rows(
        self, encoder: Encoder, x: Float[Tensor, "batch d_in"], x_compute: Float[Tensor, "batch d_in"], k: int
    ) -> EntryValues:
        """Return each row's `k` largest pre-activations, screened by an int8 product if that is faster."""
        found = None
        if x_compute.dtype is not x.dtype:
            found = screened_topk(x, encoder.W_enc, encoder.b_enc, encoder.b_dec, k)
        if found is None:
            return super().largest_of_rows(encoder, x, x_compute, k)
        pre_acts, indices = (entries.view(-1) for entries in found)
        offsets = torch.arange(0, len(x) * k + 1, k)
        return EntryValues(pre_acts, indices, offsets, self.to_csc(indices, offsets, len(encoder.b_enc)))

    def entries_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        threshold: Float[Tensor, " d_sae"] | float,
        most: float,
    ) -> Entries | DenseEntries:
        """Return the entries above a threshold, unsorted within a row, or all if more than a fraction `most` are."""
        found = search_above(x, W_enc, b_enc, threshold, most)
        return super().entries_above(x, W_enc, b_enc, threshold, most) if found is None else found

    def largest_of_batch(self, pre_acts: Float[Tensor, "batch d_sae"], n_kept: int) -> Entries:
        """Return the batch's `n_kept` largest positive pre-activations, unsorted within a row."""
        found = largest_of_batch(pre_acts, n_kept)
        return super().largest_of_batch(pre_acts, n_kept) if found is None else found
