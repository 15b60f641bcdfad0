"""The held-out rows that are evaluated, and how they are read from the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...shared.core.errors import StoreError
from ...shared.store import ActivationStore

MAX_GROUPS = 1024
"""Most bootstrap groups. With more documents than this, several share a group, which bounds the sums kept."""


@dataclass(frozen=True)
class RowBlock:
    """The usable rows of some held-out contexts; `group` is each row's bootstrap group."""

    n_contexts: int
    activations: dict[str, Float[Tensor, "rows d_in"]]
    group: Int64[Tensor, " rows"]


@dataclass(frozen=True)
class HeldOut:
    """The held-out contexts under evaluation, with the document group of every row.

    `usable` excludes masked rows, and rows of other roles if the store is limited to some roles; then `unmasked` holds
    the unmasked rows of every role. Otherwise `unmasked` is None.
    """

    store: ActivationStore
    contexts: Int64[np.ndarray, " contexts"]
    usable: Bool[np.ndarray, "contexts context"]
    group: Int64[np.ndarray, "contexts context"]
    n_documents: int
    unmasked: Bool[np.ndarray, "contexts context"] | None = None

    @property
    def n_groups(self) -> int:
        """The number of bootstrap groups."""
        return min(self.n_documents, MAX_GROUPS)

    @property
    def n_rows(self) -> int:
        """The number of usable rows."""
        return int(self.usable.sum())

    def blocks(self, hook_points: Sequence[str], block_rows: int, device: str = "cpu") -> Iterator[RowBlock]:
        """Read the usable rows of several hook points as float32, about `block_rows` at a time, in whole contexts."""
        size = self.store.context_size
        step = max(1, block_rows // size)
        for first in range(0, len(self.contexts), step):
            part = slice(first, min(first + step, len(self.contexts)))
            usable = torch.from_numpy(self.usable[part].reshape(-1))
            spans = context_spans(self.contexts[part])
            activations = {}
            for hook_point in hook_points:
                rows = [self.store.read(hook_point, start * size, stop * size) for start, stop in spans]
                x = rows[0] if len(rows) == 1 else torch.cat(rows)
                activations[hook_point] = x[usable].to(device, torch.float32)
            group = torch.from_numpy(self.group[part].reshape(-1))[usable].to(device)
            yield RowBlock(part.stop - part.start, activations, group)

    def token_batches(self, batch_size: int) -> Iterator[tuple[Int64[Tensor, "batch context"], slice]]:
        """Yield the tokens of `batch_size` contexts at a time, and their slice of `contexts`."""
        size = self.store.context_size
        for first in range(0, len(self.contexts), batch_size):
            part = slice(first, min(first + batch_size, len(self.contexts)))
            spans = context_spans(self.contexts[part])
            tokens = [self.store.tokens(start * size, stop * size) for start, stop in spans]
            yield torch.cat([rows for rows in tokens if rows is not None]).to(torch.int64).reshape(-1, size), part

    def subset(self, max_rows: int | None) -> HeldOut:
        """Return evenly spaced contexts with at most `max_rows` rows in all; documents keep their groups."""
        chosen = evenly_spaced(len(self.contexts), max_rows, self.store.context_size)
        unmasked = None if self.unmasked is None else self.unmasked[chosen]
        contexts, usable, group = self.contexts[chosen], self.usable[chosen], self.group[chosen]
        return replace(self, contexts=contexts, usable=usable, group=group, unmasked=unmasked)


def evenly_spaced(n_contexts: int, max_rows: int | None, context_size: int) -> Int64[np.ndarray, " chosen"]:
    """Return evenly spaced context numbers: at least one, otherwise with at most `max_rows` rows in all."""
    n_chosen = n_contexts if max_rows is None else min(n_contexts, max(1, max_rows // context_size))
    return np.arange(n_chosen, dtype=np.int64) * n_contexts // max(n_chosen, 1)


def context_spans(contexts: Int64[np.ndarray, " contexts"]) -> list[tuple[int, int]]:
    """Merge increasing context numbers into runs [start, stop)."""
    breaks = np.flatnonzero(np.diff(contexts) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(contexts, breaks)]


def held_out(store: ActivationStore, max_rows: int | None = None) -> HeldOut:
    """Return a store's held-out contexts with their usable rows and document groups.

    Raises:
        StoreError: no context is held out, or no held-out row is usable.
    """
    contexts = np.flatnonzero(store.held_out_contexts())
    if not len(contexts):
        raise StoreError(
            f"store '{store.path}' has no held-out rows to evaluate on: {store.n_contexts:,} contexts, 0 held out; "
            "harvest with holdout_fraction above 0, or more tokens, or pass held_out to ActivationStoreWriter.append"
        )
    chosen = contexts[evenly_spaced(len(contexts), max_rows, store.context_size)]
    return _rows_of(store, chosen, "held-out")


def training_rows(store: ActivationStore, max_rows: int | None = None) -> HeldOut:
    """Return a store's training contexts, evenly spaced where there are more than `max_rows` rows, as `held_out` does.

    Raises:
        StoreError: every context is held out, or no training row is usable.
    """
    contexts = np.flatnonzero(~store.held_out_contexts())
    if not len(contexts):
        raise StoreError(f"store '{store.path}' has no training rows: all {store.n_contexts:,} contexts are held out")
    chosen = contexts[evenly_spaced(len(contexts), max_rows, store.context_size)]
    return _rows_of(store, chosen, "training")


def _rows_of(store: ActivationStore, contexts: Int64[np.ndarray, " contexts"], kind: str) -> HeldOut:
    """Return some contexts with their usable rows and document groups."""
    size = store.context_size
    usable = np.empty((len(contexts), size), dtype=bool)
    unmasked = usable if store.used_roles is None else np.empty_like(usable)
    documents = np.empty((len(contexts), size), dtype=np.int64)
    for part, start, stop in _by_shard(contexts, store.shard_rows // size):
        within = contexts[part] - start
        usable[part] = store.row_mask(start * size, stop * size).reshape(-1, size)[within]
        if unmasked is not usable:
            unmasked[part] = store.row_mask(start * size, stop * size, any_role=True).reshape(-1, size)[within]
        documents[part] = store.document_keys(start * size, stop * size).reshape(-1, size)[within]
    if not usable.any():
        raise StoreError(
            f"store '{store.path}' has {usable.size:,} {kind} rows and every one is masked"
            + (f" or of another role than {', '.join(store.used_roles)}" if store.used_roles else "")
            + "; harvest more tokens"
        )
    _, rank = np.unique(documents[usable], return_inverse=True)
    group = np.zeros(usable.shape, dtype=np.int64)
    group[usable] = rank % MAX_GROUPS
    others = None if unmasked is usable else unmasked
    return HeldOut(store, contexts, usable, group, int(rank.max()) + 1, others)


def _by_shard(contexts: Int64[np.ndarray, " contexts"], per_shard: int) -> Iterator[tuple[slice, int, int]]:
    """Yield, per shard, the slice of `contexts` in it and the range [start, stop) that those contexts span."""
    edges = np.flatnonzero(np.diff(contexts // per_shard)) + 1
    for first, last in pairwise([0, *edges.tolist(), len(contexts)]):
        yield slice(first, last), int(contexts[first]), int(contexts[last - 1]) + 1
