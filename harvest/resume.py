"""Compare the contexts that an existing store holds with those packed now.

A resumed harvest packs all contexts again. Those already stored must be the same, or the store would mix two texts. If
a store is extended, the last few may differ, because packing ends with the contexts that remain of each split.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..shared.core.errors import StoreError
from ..shared.core.location import StoreUrl
from ..shared.core.terminal.progress import progress
from ..shared.store import ActivationStore
from .config import HarvestConfig
from .reuse import find_manifest
from .tokens.packing import Context

if TYPE_CHECKING:
    from ..shared.store.format.layout import Header

_SECONDS_BEFORE_BAR = 2.0


class Resumed(NamedTuple):
    """The contexts of a harvest (None for those before the first batch), and how many of them the store keeps."""

    contexts: Iterator[Any]
    n_kept: int


def resume_contexts(store: Path | StoreUrl, config: HarvestConfig, contexts: Iterator[Context], group: int) -> Resumed:
    """Compare the contexts that a store holds with those packed now.

    Raises `StoreError` for a context that differs, except for the last few if the store is extended.
    """
    manifest = find_manifest(store)
    if manifest is None or not manifest.shards:
        return Resumed(contexts, 0)
    stored = ActivationStore.open(store, cache=config.cache)
    header = stored.manifest.header
    n_free = 0 if header.n_contexts == config.n_contexts else 2 * group - 1
    recent: list[Context] = []
    first = n_same = 0
    bar = progress(total=stored.n_rows, desc="compare", unit="token", unit_scale=True, delay=_SECONDS_BEFORE_BAR)
    with closing(bar):
        for start in range(0, stored.n_contexts, header.contexts_per_shard):
            stop = min(start + header.contexts_per_shard, stored.n_contexts)
            packed = list(islice(contexts, stop - start))
            recent += packed
            n_same = start + count_same(stored, header, start, packed)
            bar.update((stop - start) * stored.context_size)
            if n_same < stop:
                break
            beginning = (
                contexts_in_full_shards(n_same, header.contexts_per_shard) // config.batch_size * config.batch_size
            )
            recent, first = recent[beginning - first :], beginning
    if n_same < stored.n_contexts - n_free:
        difference = _describe(stored, n_same, recent[n_same - first :])
        raise StoreError(
            f"the store '{store}' cannot be resumed: its context {n_same} is not the one packed now ({difference}); "
            "use the same text, tokenizer and versions, or name another store"
        )
    n_kept = contexts_in_full_shards(n_same, header.contexts_per_shard) if n_free else stored.n_contexts
    return Resumed(chain(repeat(None, first), recent, contexts), n_kept)


def contexts_in_full_shards(n_contexts: int, per_shard: int) -> int:
    """Return how many of the contexts are in full shards."""
    return n_contexts // per_shard * per_shard


def count_same(stored: ActivationStore, header: Header, start: int, packed: list[Context]) -> int:
    """Return how many of the packed contexts, from number `start` on, equal the stored ones."""
    if not packed:
        return 0
    rows = slice(start * header.context_size, (start + len(packed)) * header.context_size)
    shape = (len(packed), header.context_size)
    tokens = stored.tokens(rows.start, rows.stop)
    documents, positions = stored.documents(rows.start, rows.stop)
    same = stored.held_out_contexts()[start : start + len(packed)] == [context.held_out for context in packed]
    for found, name in ((tokens, "tokens"), (documents, "documents"), (positions, "positions")):
        if found is not None:
            now = np.stack([getattr(context, name) for context in packed])
            same &= (np.asarray(found).reshape(shape) == now).all(axis=1)
    return len(packed) if same.all() else int(same.argmin())


def _describe(stored: ActivationStore, context: int, packed: list[Context]) -> str:
    document = int(stored.documents(context * stored.context_size, context * stored.context_size + 1)[0][0])
    there = stored.document_info(document)[1] if document >= 0 else "no document"
    here = packed[0].info.get(int(packed[0].documents[0]), (0, "no document"))[1] if packed else "no text is left"
    return f"it was from '{there}', now it is from '{here}'"
