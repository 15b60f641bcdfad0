"""The contract of a backend: the operations that training asks of a device.

Latents are CSR by row (see `entries.py`); `W_enc` and `W_dec` have one row per latent. Gradients are written by hand,
so no operation needs autograd. `reference.py` computes each operation in plain PyTorch, and the tests compare the other
backends with it.

| operation | shapes | has a faster form |
|---|---|---|
| `pre_activations` | `[batch, d_in] -> [batch, d_sae]` | cpu: row blocks on all cores |
| `select_topk` | `[batch, d_in] -> [batch, k]` twice | cpu: by groups' maxima; triton: in the product's epilogue |
| `largest_of_rows` | `[batch, d_in] -> batch * k` entries | cpu: screened by an int8 product |
| `entries_above` | `[batch, d_in] -> nnz` entries | cpu: by groups' maxima |
| `largest_of_batch` | `[batch, d_sae] -> nnz` entries | cpu: by groups' maxima |
| `topk_of_rows` | `[batch, n] -> [batch, k]` twice | cpu, reference: by groups' maxima |
| `decode` | `nnz` values `-> [batch, d_out]` | cpu: `embedding_bag`; triton |
| `grad_values` | `[batch, d_out] -> nnz` | cpu: sampled products; triton |
| `grad_weights`, `grad_weights_and_bias`, `sum_by_latent` | `nnz` values `-> [d_sae, d_out]`, `[d_sae]` | cpu: sorted \
once; triton |
| `normalise` | `[batch, d_in] -> [batch, d_in]` twice | cpu: row blocks; triton: one pass |
| `dequantise` | int8 `[rows, d_in] -> [batch, d_in]` | triton: gathers and dequantises in one pass |

Two capabilities are optional and None where a backend lacks them: `deferred_gradient` (cpu has it) and `fixed_shapes`
(triton).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float, Int, Int8, Int64
from torch import Tensor

from .across import Across
from .encoder import Encoder
from .entries import DenseEntries, Entries, EntryValues, Selection, batch_threshold, entries_of
from .fused_state import TopKOptions
from .gradient import DeferGradient

if TYPE_CHECKING:
    from .triton.topk_step import TopKStep


class FixedShapes(Protocol):
    """Selections into buffers of a fixed size, and TopK's fused step: the host never waits for the device.

    A step of these operations can be captured in a CUDA graph. `capacity` is the number of entries that a buffer holds;
    entries beyond it are dropped, which `offsets[-1] > capacity` shows.
    """

    @staticmethod
    def select_threshold(
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        threshold: Float[Tensor, " d_sae"] | float,
        capacity: int | None = None,
    ) -> Selection:
        """Return the latents whose pre-activation is above `threshold`."""
        ...

    @staticmethod
    def batch_floor(
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        margin: float = 1.25,
    ) -> Float[Tensor, ""]:
        """Return a value that is rarely above the batch's `batch * k` largest pre-activations."""
        ...

    @staticmethod
    def select_batch_topk(
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        k: int,
        floor: Float[Tensor, ""] | float = 0.0,
        capacity: int | None = None,
    ) -> tuple[Selection, Float[Tensor, ""], Bool[Tensor, ""]]:
        """Return the `batch * k` largest positive latents, the smallest of them, and whether the result is exact.

        Only latents above `floor` are candidates. The result is exact if there were enough of them and all fitted in
        the capacity.
        """
        ...

    @staticmethod
    def topk_step(
        parameters: Mapping[str, Tensor],
        options: TopKOptions,
        compute_dtype: torch.dtype,
        across: Across | None = None,
    ) -> TopKStep:
        """Return the training state of a TopK SAE whose steps run as a few fused kernels, `across` several ranks."""
        ...


class Backend(Protocol):
    """The operations of a device.

    Static methods are primitive, and every backend implements them. The other methods are composed of them here; a
    backend overrides those that it can do faster.

    `csc` is always optional: pass the result of `to_csc` for the same indices and offsets to sort only once.
    """

    name: ClassVar[str]
    deferred_gradient: ClassVar[DeferGradient | None] = None
    fixed_shapes: ClassVar[FixedShapes | None] = None

    @staticmethod
    def pre_activations(
        x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """Return all of `x W_enc^T + b_enc`."""
        ...

    @staticmethod
    def select_topk(
        x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"], k: int
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """Return the `k` largest pre-activations of each row, after ReLU, and their latents, in any order."""
        ...

    @staticmethod
    def decode(
        values: Float[Tensor, " nnz"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " batch_plus_1"],
        W_dec: Float[Tensor, "d_sae d_out"],
    ) -> Float[Tensor, "batch d_out"]:
        """Return `sum_j values_j W_dec[indices_j]` for each row."""
        ...

    @staticmethod
    def grad_values(
        g: Float[Tensor, "batch d_out"],
        W_dec: Float[Tensor, "d_sae d_out"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " batch_plus_1"],
        csc: Any = None,
    ) -> Float[Tensor, " nnz"]:
        """Return `g[row_j] . W_dec[indices_j]` for each entry."""
        ...

    @staticmethod
    def grad_weights(
        values: Float[Tensor, " nnz"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " batch_plus_1"],
        g: Float[Tensor, "batch d_out"],
        d_sae: int,
        csc: Any = None,
    ) -> Float[Tensor, "d_sae d_out"]:
        """Return for each latent the sum of `values_j g[row_j]` over its entries; zero for an unused latent."""
        ...

    @staticmethod
    def sum_by_latent(
        values: Float[Tensor, " nnz"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " batch_plus_1"],
        d_sae: int,
        csc: Any = None,
    ) -> Float[Tensor, " d_sae"]:
        """Return the sum of each latent's values, as the gradients of biases and thresholds need it."""
        ...

    @staticmethod
    def grad_weights_and_bias(
        values: Float[Tensor, " nnz"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " batch_plus_1"],
        g: Float[Tensor, "batch d_out"],
        d_sae: int,
        csc: Any = None,
    ) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, " d_sae"]]:
        """Return `grad_weights` and `sum_by_latent` of the same values."""
        ...

    @staticmethod
    def to_csc(indices: Int[Tensor, " nnz"], offsets: Int[Tensor, " batch_plus_1"], d_sae: int) -> Any:
        """Return the entries sorted by latent, in a backend-specific form; None if the backend does not need this."""
        ...

    @staticmethod
    def topk_of_rows(
        pre_acts: Float[Tensor, "batch n"], k: int
    ) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
        """Return each row's `k` largest entries and their columns, in any order; entries below zero are arbitrary."""
        ...

    @staticmethod
    def normalise(
        rows: Float[Tensor, "batch d_in"],
        mean: Float[Tensor, " d_in"],
        factor: float | Float[Tensor, " d_in"],
        dtype: torch.dtype = torch.bfloat16,
        max_norm: float = math.inf,
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_in"]]:
        """Return `(rows - mean) * factor`, each row shortened to a norm of at most `max_norm`.

        It is in float32 and in `dtype`; one tensor twice if that is float32.
        """
        ...

    @staticmethod
    def dequantise(
        values: Int8[Tensor, "rows d_in"],
        scales: Float[Tensor, " rows"],
        places: Int64[Tensor, " batch"],
        dtype: torch.dtype = torch.bfloat16,
    ) -> Float[Tensor, "batch d_in"]:
        """Return rows `places` of `scales * values`, rounded as the store's reader rounds them."""
        ...

    def values_at(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        entries: Entries,
    ) -> EntryValues:
        """Compute `W_enc x + bias` for the chosen entries only, in the precision of `x`."""
        pre_acts = self.grad_values(x, W_enc, entries.indices, entries.offsets)
        return EntryValues(pre_acts.add_(bias.index_select(0, entries.indices)), *entries)

    def largest_of_rows(
        self, encoder: Encoder, x: Float[Tensor, "batch d_in"], x_compute: Float[Tensor, "batch d_in"], k: int
    ) -> EntryValues:
        """Return each row's `k` largest pre-activations, positive or not, as `k` consecutive entries per row.

        They are chosen from a product in the compute dtype. A faster form may choose them in the precision of `x`;
        entries that are not positive may then be replaced by zeros of arbitrary latents.
        """
        _, top = self.select_topk(x_compute, encoder.W_enc_compute, encoder.bias, k)
        offsets = torch.arange(0, len(x) * k + 1, k, device=x.device)
        return self.values_at(x, encoder.W_enc, encoder.bias, Entries(top.reshape(-1), offsets))

    def entries_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        threshold: Float[Tensor, " d_sae"] | float,
        most: float,
    ) -> Entries | DenseEntries:
        """Return the entries above a threshold, or all pre-activations if more than a fraction `most` are above it."""
        pre_acts = self.pre_activations(x, W_enc, b_enc)
        if isinstance(threshold, Tensor):
            threshold = threshold.to(pre_acts.dtype)
        chosen = pre_acts > threshold
        n_chosen = int(torch.count_nonzero(chosen))
        return DenseEntries(pre_acts, n_chosen) if n_chosen >= most * chosen.numel() else entries_of(chosen)

    def largest_of_batch(self, pre_acts: Float[Tensor, "batch d_sae"], n_kept: int) -> Entries:
        """Return the batch's `n_kept` largest positive pre-activations, including all ties with the smallest."""
        return entries_of(pre_acts >= batch_threshold(pre_acts, n_kept))
