"""Which shards of a store a process makes: all that are missing, or with several ranks every n-th of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ShardAssignment:
    """One rank's part of the missing shards: a pure function of the store's state when the ranks started.

    `n_committed` is the number of committed contexts, `staged` the number of contexts of each staged shard.
    """

    contexts_per_shard: int
    n_committed: int
    staged: Mapping[int, int] = field(default_factory=dict)
    rank: int = 0
    n_ranks: int = 1

    @property
    def n_done(self) -> int:
        """The number of contexts that are committed or staged."""
        return self.n_committed + sum(self.staged.values())

    def owns(self, shard: int) -> bool:
        """Return whether this rank makes the shard: every `n_ranks`-th of the missing ones, in order."""
        first = self.n_committed // self.contexts_per_shard
        if shard < first or shard in self.staged:
            return False
        left_before = shard - first - sum(staged < shard for staged in self.staged)
        return left_before % self.n_ranks == self.rank

    def first_context(self, context: int) -> int:
        """Return the first context, from `context` on, that this rank makes."""
        context = max(context, self.n_committed)
        shard = context // self.contexts_per_shard
        while not self.owns(shard):
            shard += 1
        return max(context, shard * self.contexts_per_shard)

    def parts(self, start: int, stop: int) -> list[range]:
        """Return the contexts in [start, stop) that this rank makes, as maximal runs."""
        runs = []
        while (first := self.first_context(start)) < stop:
            start = min(stop, (first // self.contexts_per_shard + 1) * self.contexts_per_shard)
            if runs and runs[-1].stop == first:
                runs[-1] = range(runs[-1].start, start)
            else:
                runs.append(range(first, start))
        return runs
