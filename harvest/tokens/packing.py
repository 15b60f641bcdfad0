"""Pack tokenized documents into contexts, each entirely for training or entirely held out.

A document's tokens keep their roles; a BOS that packing adds has the role `PLACED`.

Everything here is a pure function of the documents and the configuration: a resumed harvest packs the same contexts
again and skips those already stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ...shared.core.errors import DataError
from ...shared.store.format.roles import PLACED, TEXT
from .holdout import context_split, is_held_out


class TokenizedDocument(NamedTuple):
    """A document's number in the source, name, hash, tokens without BOS, and roles unless all are text."""

    number: int
    name: str
    hash: int
    tokens: np.ndarray
    roles: np.ndarray | None = None


class Context(NamedTuple):
    """One context: tokens, and the document, position and role of each row.

    A BOS has position 0 and belongs to the document it precedes. The document's tokens are numbered from 1, also across
    contexts.
    """

    tokens: np.ndarray  # int32 [context]
    documents: np.ndarray  # int64 [context]
    positions: np.ndarray  # int32 [context]
    held_out: bool
    info: dict[int, tuple[int, str]]  # document -> (hash, name), of the documents in this context
    roles: np.ndarray | None = None  # int8 [context]; None if the store keeps no roles


@dataclass
class _Split:
    """The packed contexts of one split that were not yet yielded, and the context being filled."""

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
        self.roles = np.empty(self.context_size, np.int8)
        self.info: dict[int, tuple[int, str]] = {}
        self.n_filled = 0

    def add(self, document: TokenizedDocument, bos: int, bos_every_context: bool) -> None:
        """Append a BOS and the document, starting new contexts as they fill."""
        begin = np.array([bos], np.int32)
        roles = document.roles if document.roles is not None else np.full(len(document.tokens), TEXT, np.int8)
        self._put(document, begin, 0, PLACED)
        done = 0
        while done < len(document.tokens):
            if bos_every_context and self.n_filled == 0:
                self._put(document, begin, 0, PLACED)
            take = min(len(document.tokens) - done, self.context_size - self.n_filled)
            part = slice(done, done + take)
            self._put(document, document.tokens[part], done + 1, roles[part])
            done += take

    def _put(self, document: TokenizedDocument, tokens: np.ndarray, position: int, roles: np.ndarray | int) -> None:
        start, stop = self.n_filled, self.n_filled + len(tokens)
        self.tokens[start:stop] = tokens
        self.documents[start:stop] = document.number
        self.positions[start:stop] = np.arange(position, position + len(tokens))
        self.roles[start:stop] = roles
        self.info[document.number] = (document.hash, document.name)
        self.n_filled = stop
        if stop == self.context_size:
            self.ready.append(
                Context(self.tokens, self.documents, self.positions, self.held_out, self.info, self.roles)
            )
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
    holdout: Literal["documents", "contexts"] = "documents",
) -> Iterator[Context]:
    """Yield at most `n_contexts` contexts, `group` of one split at a time.

    Groups let a chunk of the store hold rows of one split. With `holdout="contexts"` documents are packed regardless
    of the split, and whole contexts are then held out, trained on or left out by their number. Reading stops once
    enough contexts are packed; what is then left of either split follows in groups that may be short, held-out first.
    Raises `DataError` when there was no text, or none for one of the splits.
    """
    splits = {held_out: _Split(held_out, context_size) for held_out in (False, True)}
    n_emitted, n_seen, n_documents = 0, {False: 0, True: 0}, 0

    def counted() -> Iterator[TokenizedDocument]:
        nonlocal n_documents
        for document in documents:
            n_documents += 1
            yield document

    fill = _fill_by_document if holdout == "documents" else _fill_by_context
    for split in fill(counted(), splits, bos, bos_every_context, holdout_fraction):
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
        _check(split, n_seen[split.held_out], holdout_fraction, holdout, n_documents)
        yield from rest


def _fill_by_document(
    documents: Iterable[TokenizedDocument],
    splits: Mapping[bool, _Split],
    bos: int,
    bos_every_context: bool,
    fraction: float,
) -> Iterator[_Split]:
    """Pack each document into its split, and yield the split."""
    for document in documents:
        split = splits[is_held_out(document.hash, fraction)]
        split.add(document, bos, bos_every_context)
        yield split


def _fill_by_context(
    documents: Iterable[TokenizedDocument],
    splits: Mapping[bool, _Split],
    bos: int,
    bos_every_context: bool,
    fraction: float,
) -> Iterator[_Split]:
    """Pack all documents, assign each context to a split by its number, and yield that split.

    Yields after every context, because one document may fill more contexts than are needed.
    """
    whole = _Split(False, splits[False].context_size)
    number = 0
    for document in documents:
        whole.add(document, bos, bos_every_context)
        for context in whole.ready:
            held_out = context_split(number, fraction)
            number += 1
            if held_out is not None:
                splits[held_out].ready.append(context._replace(held_out=held_out))
                yield splits[held_out]
        whole.ready.clear()


def _check(split: _Split, n_contexts: int, holdout_fraction: float, holdout: str, n_documents: int) -> None:
    """Raise `DataError` if a required split has no context."""
    if n_contexts or (split.held_out and holdout_fraction == 0):
        return
    kind = "held-out" if split.held_out else "training"
    few = holdout == "documents" and holdout_fraction > 0
    raise DataError(
        f"no {kind} context of {split.context_size} tokens was packed from {n_documents:,} "
        f"document{'s' * (n_documents != 1)} (holdout_fraction {holdout_fraction}); "
        + ('set holdout = "contexts" to hold out parts of documents, ' if few else "")
        + "give more text or tokens, or change holdout_fraction or context_size"
    )


class ContextBatch(NamedTuple):
    """Contexts of one forward pass, with the provenance of each row."""

    tokens: np.ndarray  # int32 [batch, context]
    documents: np.ndarray  # int64 [batch, context]
    positions: np.ndarray  # int32 [batch, context]
    held_out: np.ndarray  # bool [batch]
    info: dict[int, tuple[int, str]]
    first: int = 0  # number of the first context
    roles: np.ndarray | None = None  # int8 [batch, context], where the store keeps them

    @property
    def stop(self) -> int:
        """The number of the context after the last one."""
        return self.first + len(self.tokens)


def stack(contexts: list[Context], first: int = 0) -> ContextBatch:
    """Stack contexts, the first of which has number `first`, into a batch."""
    roles = [context.roles for context in contexts if context.roles is not None]
    return ContextBatch(
        np.stack([context.tokens for context in contexts]),
        np.stack([context.documents for context in contexts]),
        np.stack([context.positions for context in contexts]),
        np.array([context.held_out for context in contexts]),
        {number: info for context in contexts for number, info in context.info.items()},
        first,
        np.stack(roles) if roles else None,
    )
