"""The rows that explanations are made from and scored on, and what fires on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from ...shared.core.errors import NonFiniteError, StoreError
from ...shared.core.terminal.progress import progress as show_progress
from ...shared.model.hook_points import members
from ...shared.store import ActivationStore
from ..features.sparse import active_latents
from ..metrics.encoding import rows_at_a_time
from ..metrics.held_out import HeldOut, context_spans, held_out, training_rows
from ..saes.hook_group import concatenate
from ..saes.sae_folders import EvaluatedSae

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Corpus:
    """Contexts of training documents, then contexts of held-out documents, as flat arrays of rows.

    Rows below `n_train` may be shown to an explainer; the others are for scores alone. `group` is the bootstrap group
    of a row's document and counts within each of the two parts. Windows are `window` consecutive rows of one context;
    the rows at the end of a context that do not fill a window belong to none (`window_of` is -1 there).
    """

    train: HeldOut
    test: HeldOut
    tokens: Int32[np.ndarray, " rows"]
    usable: Bool[np.ndarray, " rows"]
    group: Int64[np.ndarray, " rows"]
    position: Int64[np.ndarray, " rows"]
    context_size: int
    window: int

    @property
    def n_rows(self) -> int:
        """The number of rows, usable or not."""
        return len(self.tokens)

    @property
    def n_train(self) -> int:
        """The number of rows of training documents, which come first."""
        return len(self.train.contexts) * self.context_size

    @cached_property
    def window_of(self) -> Int64[np.ndarray, " rows"]:
        """The window of each row, or -1."""
        per_context = self.context_size // self.window
        context, within = np.divmod(np.arange(self.n_rows), self.context_size)
        return np.where(within < per_context * self.window, context * per_context + within // self.window, -1)

    @property
    def n_windows(self) -> int:
        """The number of windows."""
        return (self.n_rows // self.context_size) * (self.context_size // self.window)

    @cached_property
    def window_start(self) -> Int64[np.ndarray, " windows"]:
        """The first row of each window."""
        context, within = np.divmod(np.arange(self.n_windows), self.context_size // self.window)
        return context * self.context_size + within * self.window

    @cached_property
    def window_rows(self) -> Int64[np.ndarray, " windows"]:
        """The number of usable rows in each window."""
        inside = self.window_of >= 0
        return np.bincount(self.window_of[inside & self.usable], minlength=self.n_windows)

    @property
    def first_test_window(self) -> int:
        """The first window of held-out documents."""
        return len(self.train.contexts) * (self.context_size // self.window)

    @cached_property
    def window_group(self) -> Int64[np.ndarray, " windows"]:
        """The document group of each window: that of its first usable row."""
        first = np.where(self.usable & (self.window_of >= 0))[0]
        window, where = np.unique(self.window_of[first], return_index=True)
        found = np.zeros(self.n_windows, dtype=np.int64)
        found[window] = self.group[first[where]]
        return found


def read_corpus(store: ActivationStore, explain_rows: int, score_rows: int, window: int) -> Corpus:
    """Read the tokens of evenly spaced training contexts and held-out contexts.

    Raises:
        StoreError: the store holds no tokens, no training contexts or no held-out contexts.
    """
    if not store.has_tokens:
        raise StoreError(
            f"the store '{store.path}' holds no tokens, which explanations are about; write it with tokens"
        )
    train, test = training_rows(store, explain_rows), held_out(store, score_rows)
    parts = [(store.tokens(start, stop), store.documents(start, stop)[1]) for start, stop in _spans(train, test)]
    return Corpus(
        train,
        test,
        np.concatenate([np.asarray(tokens) for tokens, _ in parts]).astype(np.int32),
        np.concatenate([part.usable.reshape(-1) for part in (train, test)]),
        np.concatenate([part.group.reshape(-1) for part in (train, test)]),
        np.concatenate([np.asarray(position) for _, position in parts]).astype(np.int64),
        store.context_size,
        min(window, store.context_size),
    )


def _spans(*parts: HeldOut) -> list[tuple[int, int]]:
    size = parts[0].store.context_size
    return [(start * size, stop * size) for part in parts for start, stop in context_spans(part.contexts)]


@dataclass(frozen=True)
class Firings:
    """Where chosen latents fire in a corpus: rows and activations by latent, rows in order."""

    latents: Int64[np.ndarray, " latents"]
    start: Int64[np.ndarray, " latents_plus_1"]
    row: Int64[np.ndarray, " entries"]
    value: Float32[np.ndarray, " entries"]

    def of(self, number: int) -> tuple[Int64[np.ndarray, " firings"], Float32[np.ndarray, " firings"]]:
        """Return the rows and activations of the `number`-th of the chosen latents."""
        part = slice(self.start[number], self.start[number + 1])
        return self.row[part], self.value[part]

    def select(self, latents: Int64[np.ndarray, " some"]) -> Firings:
        """Return the firings of some of the latents, in order of `latents`, which is sorted."""
        numbers = np.searchsorted(self.latents, latents)
        parts = [self.of(int(number)) for number in numbers]
        start = np.concatenate([[0], np.cumsum([len(row) for row, _ in parts])]).astype(np.int64)
        rows, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Firings(latents, start, rows, values)


def read_firings(corpus: Corpus, sae: EvaluatedSae, latents: Sequence[int] | np.ndarray, device: str) -> Firings:
    """Encode the usable rows of a corpus and keep the chosen latents.

    Raises:
        NonFiniteError: a latent is NaN or infinite.
    """
    latents = np.unique(np.asarray(latents, dtype=np.int64))
    place = np.full(sae.sae.d_sae, -1, dtype=np.int64)
    place[latents] = np.arange(len(latents))
    rows, numbers, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    usable = np.flatnonzero(corpus.usable)
    at, step = 0, rows_at_a_time(sae.sae)
    hook_points = members(sae.hook_point)
    with show_progress(total=len(usable), unit="token", unit_scale=True, desc=f"encode {sae.name}") as progress:
        for part in (corpus.train, corpus.test):
            for block in part.blocks(hook_points, _BLOCK_ROWS, device):
                x = concatenate(block.activations, sae.hook_point)
                active = active_latents(sae.sae, x, np.ones(len(x), dtype=bool), 0, len(x), step)
                if not np.isfinite(active.value).all():
                    raise NonFiniteError(f"latents of SAE '{sae.name}' are NaN or infinite on rows of the store")
                number = place[active.latent]
                kept = number >= 0
                rows.append(usable[at + active.row[kept]])
                numbers.append(number[kept])
                values.append(active.value[kept])
                at += len(x)
                progress.update(len(x))
    number = np.concatenate(numbers)
    order = np.argsort(number, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=len(latents)))])
    return Firings(latents, start, np.concatenate(rows)[order], np.concatenate(values)[order])
