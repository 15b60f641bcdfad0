"""Show the progress of all ranks in rank 0's bar."""

from __future__ import annotations

import time

from ...shared.store.write.rank_writer import RankWriter
from ..config import HarvestConfig
from ..progress import HarvestProgress
from .rank_group import RankGroup

SECONDS = 1.0


class RankProgress(HarvestProgress):
    """Each rank publishes its progress once a second; rank 0 shows the sum."""

    def __init__(self, ranks: RankGroup, writer: RankWriter, config: HarvestConfig) -> None:
        super().__init__(
            writer,
            config.context_size,
            config.n_contexts,
            writer.assignment.n_done,
            disable=True if ranks.rank else None,
        )
        self._ranks = ranks
        self._own = 0
        self._shown = 0
        self._next = 0.0
        self.bytes_written, self.raw_bytes = 0, 0

    def update(self, n_contexts: int) -> None:
        """Count contexts that this rank passed to its writer."""
        self._own += n_contexts
        self.refresh()

    def refresh(self, now: bool = False) -> None:
        """Publish this rank's progress and show that of all ranks: once a second at most, unless `now`."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS
        self._ranks.publish("progress", f"{self._own} {self._writer.bytes_written} {self._writer.raw_bytes}")
        if self._ranks.first and (messages := self._ranks.published("progress")) is not None:
            numbers = [[int(number) for number in message.split()] for message in messages]
            n_contexts, self.bytes_written, self.raw_bytes = map(sum, zip(*numbers, strict=True))
            self._show(n_contexts - self._shown, self.bytes_written, self.raw_bytes)
            self._shown = n_contexts
