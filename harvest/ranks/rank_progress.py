"""The progress of all ranks in rank 0's bar."""

from __future__ import annotations

import time

from ...shared.store.write.rank_writer import RankWriter
from ..config import HarvestConfig
from ..progress import Progress
from .ranks import Ranks

SECONDS = 1.0


class RankProgress(Progress):
    """Each rank says once a second how far it is; rank 0 shows the sum."""

    def __init__(self, ranks: Ranks, writer: RankWriter, config: HarvestConfig) -> None:
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
        """Count contexts that this rank handed to its writer."""
        self._own += n_contexts
        self.refresh()

    def refresh(self, now: bool = False) -> None:
        """Say how far this rank is and show how far all are, if that was not done within the last second."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS
        self._ranks.say("progress", f"{self._own} {self._writer.bytes_written} {self._writer.raw_bytes}")
        if self._ranks.rank == 0 and (words := self._ranks.heard("progress")) is not None:
            said = [[int(number) for number in word.split()] for word in words]
            n_contexts, self.bytes_written, self.raw_bytes = map(sum, zip(*said, strict=True))
            self._show(n_contexts - self._shown, self.bytes_written, self.raw_bytes)
            self._shown = n_contexts
