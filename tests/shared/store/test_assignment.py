"""The assignments of the ranks: every context that is left to make is in exactly one."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.shared.store.write.assignment import ShardAssignment

SITUATIONS = st.fixed_dictionaries(
    {
        "contexts_per_shard": st.integers(1, 7),
        "shards_committed": st.integers(0, 4),
        "gaps": st.lists(st.integers(1, 9), max_size=5, unique=True),
        "world": st.integers(1, 5),
        "batch": st.integers(1, 11),
        "n_contexts": st.integers(1, 90),
    }
)


@settings(max_examples=100, deadline=None)
@given(SITUATIONS)
def test_every_context_left_is_made_by_exactly_one_rank(situation):
    size, world, n = situation["contexts_per_shard"], situation["world"], situation["n_contexts"]
    n_committed = min(situation["shards_committed"] * size, n)
    staged = {n_committed // size + gap: size for gap in situation["gaps"] if n_committed % size == 0}
    made = []
    for rank in range(world):
        assignment = ShardAssignment(size, n_committed, staged, rank, world)
        following = assignment.first_context(0)
        for start in range(0, n, situation["batch"]):
            stop = min(n, start + situation["batch"])
            parts = assignment.parts(start, stop)
            assert all(start <= part.start < part.stop <= stop for part in parts)
            assert all(left.stop < right.start for left, right in itertools.pairwise(parts))
            for part in parts:
                assert part.start == following  # where the rank's writer stands
                following = assignment.first_context(part.stop)
                made += part
    assert sorted(made) == [c for c in range(n_committed, n) if c // size not in staged]


@settings(max_examples=100, deadline=None)
@given(SITUATIONS)
def test_the_shards_left_are_dealt_out_evenly(situation):
    world = situation["world"]
    n_committed = situation["shards_committed"] * situation["contexts_per_shard"]
    staged = {situation["shards_committed"] + gap: 1 for gap in situation["gaps"]}
    assignments = [
        ShardAssignment(situation["contexts_per_shard"], n_committed, staged, rank, world) for rank in range(world)
    ]
    owned = [sum(assignment.owns(shard) for shard in range(30)) for assignment in assignments]
    assert sum(owned) == 30 - situation["shards_committed"] - len(staged)
    assert max(owned) - min(owned) <= 1


def test_one_process_makes_all_that_is_not_committed():
    assignment = ShardAssignment(contexts_per_shard=4, n_committed=8)
    assert assignment.parts(0, 8) == []
    assert assignment.parts(5, 21) == [range(8, 21)]
    assert ShardAssignment(4, 8, {3: 4}, rank=0, n_ranks=2).parts(0, 40) == [
        range(8, 12),
        range(20, 24),
        range(28, 32),
        range(36, 40),
    ]
    assert ShardAssignment(4, 8, {3: 4}).n_done == 12
