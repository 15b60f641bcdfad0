"""`ShardSink`: where a writer commits its shards to, which is a store's folder or one rank's part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..format.layout import Header
from ..local.shard_writer import WrittenShard


class ShardSink(Protocol):
    """Where written shards are committed to; `partial` is the folder for temporary files."""

    partial: Path

    @property
    def header(self) -> Header | None:
        """The store's header, or None until `start`."""
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
        """Make a written shard durable."""
        ...

    def complete(self) -> None:
        """Complete the store."""
        ...

    def clear_partial(self) -> None:
        """Remove temporary files."""
        ...

    def close(self) -> None:
        """Release the store."""
        ...
