"""Tokenize a text once by all ranks: each tokenizes every n-th batch of documents and passes the tokens to the others.

Tokens travel through the key-value store of `torch.distributed`: the pieces of batch `b` are `tokens/b/0`, `tokens/b/1`
and so on, and the last rank that reads them deletes them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from ...shared.core.errors import DataError, RankError
from ...shared.store.format.checksum import crc32c
from ..documents.documents import Document
from ..prefetch import Prefetch
from ..tokens.encode import MAX_BATCH_CHARACTERS, Tokenized, TokenizedBatch
from .rank_group import TIMEOUT, RankGroup, wait_for

VALUE_BYTES = 1 << 22
"""Less than the largest value that the key-value store takes, 8 MiB."""
SECONDS_BETWEEN_LOOKS = 0.01
_CHARACTERS_PER_TOKEN = 4


class _Part(msgspec.Struct, array_like=True):
    """A tokenized batch as it travels, with the checksum of its documents."""

    checksum: int
    names: list[str]
    documents: list[tuple[int, bytes, bytes | None, str]]


class DividedText:
    """Tokenizes batches of documents together with the other ranks; all of them get all tokens, in order.

    Every rank reads the whole text, and tokenizes its own batches in a thread, at most `ahead` batches before those
    that it has yielded. Ranks wait for each other where one is further behind than that.

    Raises:
        DataError: while iterating, if another rank read other documents.
        RankError: while iterating, if another rank failed, ended or cannot be reached.
    """

    def __init__(self, ranks: RankGroup, ahead: int) -> None:
        self._ranks = ranks
        self._ahead = ahead

    def __call__(
        self, tokenize: Callable[[list[Document]], TokenizedBatch], batches: Iterator[list[Document]]
    ) -> Iterator[TokenizedBatch]:
        """Yield the tokenized batches."""
        with Prefetch(self._read(tokenize, batches), self._ahead) as parts:
            for number, part in enumerate(parts):
                yield part if isinstance(part, TokenizedBatch) else self._receive(number, part)

    def _read(
        self, tokenize: Callable[[list[Document]], TokenizedBatch], batches: Iterator[list[Document]]
    ) -> Iterator[TokenizedBatch | int]:
        """Tokenize and send this rank's batches; yield the checksum of the others."""
        for number, batch in enumerate(batches):
            checksum = documents_checksum(batch)
            if number % self._ranks.n == self._ranks.rank:
                tokenized = tokenize(batch)
                self._send(number, checksum, tokenized)
                yield tokenized
            else:
                yield checksum

    def _send(self, number: int, checksum: int, batch: TokenizedBatch) -> None:
        documents = [
            (hash_, tokens.tobytes(), None if roles is None else roles.tobytes(), refusal)
            for hash_, tokens, roles, refusal in batch.tokenized
        ]
        message = msgspec.msgpack.encode(_Part(checksum, batch.names, documents))
        pieces = [message[start : start + VALUE_BYTES] for start in range(0, len(message), VALUE_BYTES)]
        with self._ranks.reaching():
            for index, piece in enumerate(pieces):
                self._ranks.messages.set(f"tokens/{number}/{index}", piece)  # pyright: ignore[reportArgumentType]
            self._ranks.messages.set(f"tokens/{number}", str(len(pieces)))

    def _receive(self, number: int, checksum: int) -> TokenizedBatch:
        key, rank = f"tokens/{number}", number % self._ranks.n
        messages = self._ranks.messages
        until = time.monotonic() + TIMEOUT.total_seconds()

        def check() -> None:
            self._ranks.check()
            if time.monotonic() > until:
                raise RankError(self._ranks.lost)

        with self._ranks.reaching():
            wait_for(lambda: messages.check([key]) or None, check, SECONDS_BETWEEN_LOOKS)
            keys = [f"{key}/{index}" for index in range(int(messages.get(key)))]
            part = msgspec.msgpack.decode(b"".join(map(messages.get, keys)), type=_Part)
            if messages.add(f"{key}/read", 1) == self._ranks.n - 1:
                for old in (*keys, key, f"{key}/read"):
                    messages.delete_key(old)
        if part.checksum != checksum:
            raise DataError(
                f"rank {rank} read other text than rank {self._ranks.rank} (documents from '{part.names[0]}' on); give "
                "all ranks the same text"
            )
        tokenized = [
            Tokenized(
                hash_,
                np.frombuffer(tokens, np.int32),
                None if roles is None else np.frombuffer(roles, np.int8),
                refusal,
            )
            for hash_, tokens, roles, refusal in part.documents
        ]
        return TokenizedBatch(part.names, tokenized)


def batches_ahead(shard_rows: int, n_ranks: int) -> int:
    """Return how many batches of documents hold the text of two shards of every rank."""
    return n_ranks + 2 * n_ranks * shard_rows * _CHARACTERS_PER_TOKEN // MAX_BATCH_CHARACTERS


def documents_checksum(documents: list[Document]) -> int:
    """Return the checksum of documents' names and contents."""
    checksum = 0
    for name, text, messages, input_ids in documents:
        content = text if messages is None and input_ids is None else json.dumps([messages, input_ids], default=str)
        for part in (name, content):
            checksum = crc32c(part.encode("utf-8", "surrogatepass"), checksum)
    return checksum
