"""Rank 0's bar counts the progress of all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from thresher.harvest import progress
from thresher.harvest.config import HarvestConfig
from thresher.harvest.ranks import rank_progress
from thresher.harvest.ranks.rank_group import RankGroup
from thresher.shared.store.write.assignment import ShardAssignment

CONFIG = HarvestConfig(model="m", hook_points=["blocks.0.resid_post"], store="s", tokens=800, context_size=8)


class Bar:
    """A replacement for tqdm's bar."""

    def __init__(self, total: int, initial: int, disable: bool | None, **_: Any) -> None:
        self.total, self.n, self.disable, self.postfix = total, initial, disable, ""

    def update(self, n: int) -> None:
        self.n += n

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.postfix = text


def test_rank_0_shows_the_sum_and_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []
    monkeypatch.setattr(progress, "progress", lambda **options: bars.append(Bar(**options)) or bars[-1])
    monkeypatch.setattr(rank_progress, "SECONDS", 0.0)
    words = HashStore()
    assignment = ShardAssignment(contexts_per_shard=10, n_committed=20, staged={3: 10})
    writers = [SimpleNamespace(assignment=assignment, bytes_written=0, raw_bytes=0) for _ in range(3)]
    everyone = [rank_progress.RankProgress(RankGroup(rank, 3, words, None), writers[rank], CONFIG) for rank in range(3)]
    assert [bar.disable for bar in bars] == [None, True, True]
    assert (bars[0].n, bars[0].total) == (30 * 8, 800)
    everyone[0].update(5)
    assert bars[0].n == 30 * 8  # not all ranks have published yet
    writers[1].bytes_written, writers[1].raw_bytes = 2 * 10**9, 3 * 10**9
    everyone[1].update(7)
    everyone[2].update(1)
    everyone[1].update(2)
    everyone[0].refresh()
    assert bars[0].n == (30 + 5 + 7 + 2 + 1) * 8
    assert bars[0].postfix == "2.00 GB written, ratio 1.50"
    assert (everyone[0].bytes_written, everyone[0].raw_bytes) == (2 * 10**9, 3 * 10**9)
    everyone[0].update(4)
    assert bars[0].n == (30 + 5 + 7 + 2 + 1 + 4) * 8
