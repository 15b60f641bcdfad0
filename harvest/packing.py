"""Pack tokenized documents into contexts, each wholly for training or wholly held out.

Everything here is a pure function of the documents and the configuration: a harvest that resumes
packs the same contexts again and passes over those it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..shared.errors import DataError
from .holdout import is_held_out


class TokenizedDocument(NamedTuple):
    """A document's number in the source, its name, hash and tokens without BOS."""

    number: int
    name: str
    hash: int
    tokens: np.ndarray


class Context(NamedTuple):
    """One context: tokens, and the document and position of each row.

    A BOS has position 0 and belongs to the document it precedes; the document's tokens count on
    from 1, also across contexts.
    """

    tokens: np.ndarray  # int32 [context]
    documents: np.ndarray  # int64 [context]
    positions: np.ndarray  # int32 [context]
    held_out: bool
    info: dict[int, tuple[int, str]]  # document -> (hash, name), of the documents in this context


@dataclass
class _Split:
    """The contexts of one split that were packed and not yet emitted, and the one being filled."""

    held_out: bool
    context_size: int
    ready: list[Context] = field(default_factory=list)
    n_filled: int = 0

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.tokens = np.empty(self.context_size, np.int32)
        self.documents = np.empty(self.context_size, np.int64)
        self.positions = np.empty(self.context_size, np.int32)
        self.info: dict[int, tuple[int, str]] = {}
        self.n_filled = 0

    def add(self, document: TokenizedDocument, bos: int, bos_every_context: bool) -> None:
        """Append a BOS and the document, beginning new contexts as they fill."""
        begin = np.array([bos], np.int32)
        self._put(document, begin, 0)
        done = 0
        while done < len(document.tokens):
            if bos_every_context and self.n_filled == 0:
                self._put(document, begin, 0)
            take = min(len(document.tokens) - done, self.context_size - self.n_filled)
            self._put(document, document.tokens[done : done + take], done + 1)
            done += take

    def _put(self, document: TokenizedDocument, tokens: np.ndarray, position: int) -> None:
        start, stop = self.n_filled, self.n_filled + len(tokens)
        self.tokens[start:stop] = tokens
        self.documents[start:stop] = document.number
        self.positions[start:stop] = np.arange(position, position + len(tokens))
        self.info[document.number] = (document.hash, document.name)
        self.n_filled = stop
        if stop == self.context_size:
            self.ready.append(Context(self.tokens, self.documents, self.positions, self.held_out, self.info))
            self._begin()


def pack(
    documents: Iterable[TokenizedDocument],
    *,
    context_size: int,
    bos: int,
    holdout_fraction: float,
    n_contexts: int,
    group: int = 1,
    bos_every_context: bool = True,
) -> Iterator[Context]:
    """Yield at most `n_contexts` contexts, `group` of one split at a time.

    Groups let a chunk of the store hold rows of one split. Reading stops once enough contexts are
    packed; what is then left of either split follows in groups that may be short, held-out first.
    Raises `DataError` when there was no text, or none for one of the splits.
    """
    splits = {held_out: _Split(held_out, context_size) for held_out in (False, True)}
    n_emitted, n_seen = 0, {False: 0, True: 0}
    for document in documents:
        split = splits[is_held_out(document.hash, holdout_fraction)]
        split.add(document, bos, bos_every_context)
        while len(split.ready) >= group and n_emitted + group <= n_contexts:
            yield from split.ready[:group]
            del split.ready[:group]
            n_emitted += group
            n_seen[split.held_out] += group
        if n_emitted + sum(len(split.ready) for split in splits.values()) >= n_contexts:
            break
    for split in (splits[True], splits[False]):
        rest = split.ready[: n_contexts - n_emitted]
        n_emitted += len(rest)
        n_seen[split.held_out] += len(rest)
        _check(split, n_seen[split.held_out], holdout_fraction)
        yield from rest


def _check(split: _Split, n_contexts: int, holdout_fraction: float) -> None:
    """Raise `DataError` when a split that was asked for got no context."""
    if n_contexts or (split.held_out and holdout_fraction == 0):
        return
    kind = "held-out" if split.held_out else "training"
    raise DataError(
        f"no {kind} context of {split.context_size} tokens was packed (holdout_fraction {holdout_fraction}); "
        f"give more text or tokens, or change holdout_fraction or context_size"
    )


class ContextBatch(NamedTuple):
    """Contexts that go through the model together, with the store's provenance of each row."""

    tokens: np.ndarray  # int32 [batch, context]
    documents: np.ndarray  # int64 [batch, context]
    positions: np.ndarray  # int32 [batch, context]
    held_out: np.ndarray  # bool [batch]
    info: dict[int, tuple[int, str]]
    first: int = 0  # number of the first context

    @property
    def stop(self) -> int:
        """Number of the context after the last."""
        return self.first + len(self.tokens)


def stack(contexts: list[Context], first: int = 0) -> ContextBatch:
    """Stack contexts, the first of which has number `first`, into a batch."""
    return ContextBatch(
        np.stack([context.tokens for context in contexts]),
        np.stack([context.documents for context in contexts]),
        np.stack([context.positions for context in contexts]),
        np.array([context.held_out for context in contexts]),
        {number: info for context in contexts for number, info in context.info.items()},
        first,
    )
