"""What a writer of shards needs of the place they go to: a store's folder, or a rank's part of one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..format.layout import Header
from ..local.store_folder import WrittenShard


class ShardSink(Protocol):
    """Where finished shards are committed to; `partial` is the folder for files that are being written."""

    partial: Path

    @property
    def header(self) -> Header | None:
        """The store's header, or None before the first batch."""
        ...

    @property
    def n_contexts(self) -> int:
        """Contexts in committed shards."""
        ...

    @property
    def may_append(self) -> bool:
        """Whether more shards may follow."""
        ...

    def start(self, header: Header) -> Header:
        """Begin the store."""
        ...

    def commit(self, shard: WrittenShard) -> None:
        """Keep a written shard for good."""
        ...

    def complete(self) -> None:
        """Finish what all shards are in."""
        ...

    def clear_partial(self) -> None:
        """Remove temporary files."""
        ...

    def close(self) -> None:
        """Let go of the place."""
        ...
