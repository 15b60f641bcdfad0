"""Which shards of a store a process makes: all that are left, or, of several ranks, every so many of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ShardAssignment:
    """One rank's part of what is not yet in the store: a pure function of what was there when the ranks began.

    `n_committed` counts contexts, `staged` gives the contexts of each shard that waits to be committed.
    """

    contexts_per_shard: int
    n_committed: int
    staged: Mapping[int, int] = field(default_factory=dict)
    rank: int = 0
    world: int = 1

    @property
    def n_done(self) -> int:
        """Contexts that nobody needs to make again."""
        return self.n_committed + sum(self.staged.values())

    def owns(self, shard: int) -> bool:
        """Tell whether the shard is this rank's to make: of those left, in order, every `world`-th."""
        first = self.n_committed // self.contexts_per_shard
        if shard < first or shard in self.staged:
            return False
        left_before = shard - first - sum(staged < shard for staged in self.staged)
        return left_before % self.world == self.rank

    def first_context(self, context: int) -> int:
        """Return the first context, from `context` on, that is this rank's to make."""
        context = max(context, self.n_committed)
        shard = context // self.contexts_per_shard
        while not self.owns(shard):
            shard += 1
        return max(context, shard * self.contexts_per_shard)

    def parts(self, start: int, stop: int) -> list[range]:
        """Return the longest runs of contexts in [start, stop) that are this rank's to make."""
        runs = []
        while (first := self.first_context(start)) < stop:
            start = min(stop, (first // self.contexts_per_shard + 1) * self.contexts_per_shard)
            if runs and runs[-1].stop == first:
                runs[-1] = range(runs[-1].start, start)
            else:
                runs.append(range(first, start))
        return runs
