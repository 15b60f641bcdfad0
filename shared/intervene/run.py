"""What a pass of a model with SAEs found: logits, latents and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .attached import Attached
from .splicer import Recorded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

V = TypeVar("V")


class ByHookPoint(Mapping[str, V], Generic[V]):
    """A mapping from an SAE's name to something that is computed when it is first asked for, and kept."""

    def __init__(self, names: list[str], compute: Callable[[int], V]):
        self._names, self._compute = names, compute
        self._found: dict[str, V] = {}

    def __getitem__(self, name: str) -> V:
        """Return what is under a name."""
        if name not in self._found:
            if name not in self._names:
                raise KeyError(name)
            self._found[name] = self._compute(self._names.index(name))
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        """Return the names in the order in which the SAEs were given."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of SAEs."""
        return len(self._names)


class Run:
    """The outcome of one pass over a batch of texts.

    Attributes:
        tokens: `[batch, context]`, padded on the right to the longest text.
        lengths: `[batch]`, the number of tokens of each text.
        prompt_lengths: `[batch]`, the tokens of each text before its continuation, if `SaeModel.run` was given one.
        logits: `[batch, context, vocabulary]`.
        usable: `[batch, context]`, the tokens that the SAEs read: not padding, nor the token that begins a text.
        tokenizer: the model's, or None.
        latents: for each SAE, a sparse tensor `[batch, context, d_sae]` of its latents, after any edit.
        errors: for each SAE, `[batch, context, d_out]`: the activation minus its reconstruction, zero where it read
            nothing. A crosscoder's hook points are side by side.
    """

    def __init__(
        self,
        tokens: Int64[Tensor, "batch context"],
        lengths: Int64[Tensor, " batch"],
        logits: Float[Tensor, "batch context vocabulary"],
        usable: Bool[Tensor, "batch context"],
        attached: list[Attached],
        sites: list[Recorded],
        prompt_lengths: Int64[Tensor, " batch"] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.tokens, self.lengths, self.logits, self.usable = tokens, lengths, logits, usable
        self.prompt_lengths, self.tokenizer = prompt_lengths, tokenizer
        self._attached, self._sites = attached, sites
        names = [one.name for one in attached]
        self.latents: Mapping[str, Tensor] = ByHookPoint(names, self._latents)
        self.errors: Mapping[str, Float[Tensor, "batch context d_out"]] = ByHookPoint(names, self._errors)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.tokens)

    def site(self, name: str) -> tuple[int, Attached, Recorded]:
        """Return an SAE's number, itself, and what it recorded."""
        number = [one.name for one in self._attached].index(name)
        return number, self._attached[number], self._sites[number]

    def attached(self, number: int) -> Attached:
        """Return an SAE by its number."""
        return self._attached[number]

    def scale(self, number: int) -> Float[Tensor, "batch context"] | None:
        """Return by what an SAE multiplies what its latents write at each token; None if that is one everywhere."""
        one, recorded = self._attached[number], self._sites[number]
        rows = one.scale(recorded.reads)
        if rows is None:
            return None
        whole = rows.new_ones(self.tokens.shape)
        whole[self.usable.to(rows.device)] = rows[:, 0]
        return whole

    def _latents(self, number: int) -> Tensor:
        one, recorded = self._attached[number], self._sites[number]
        where = self.usable.nonzero().to(one.sae.device)
        indices, values = [], []
        for group, codes in recorded.codes.items():
            row, column = (codes.values != 0).nonzero(as_tuple=True)
            latent = codes.latents[row, column] + one.groups[group].first
            indices.append(torch.stack([where[row, 0], where[row, 1], latent]))
            values.append(codes.values[row, column])
        size = (*self.tokens.shape, one.sae.d_sae)
        return torch.sparse_coo_tensor(
            torch.cat(indices, dim=1), torch.cat(values), size, check_invariants=False
        ).coalesce()

    def _errors(self, number: int) -> Tensor:
        one, recorded = self._attached[number], self._sites[number]
        parts = []
        for at, rows in sorted(recorded.writes.items()):
            x_hat = one.reconstruct(recorded.clean, at, recorded.reads)
            error = rows.to(x_hat.dtype) - x_hat
            whole = error.new_zeros(*self.tokens.shape, error.shape[1])
            whole[self.usable.to(error.device)] = error
            parts.append(whole)
        return torch.cat(parts, dim=2)
