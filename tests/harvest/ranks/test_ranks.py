"""Several ranks write the same bytes as one process, even after a kill; ranks that differ are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from thresher.harvest.config import HarvestConfig
from thresher.harvest.ranks.rank_group import RankGroup, rank_device
from thresher.harvest.run import harvest
from thresher.shared.core.config import load_config
from thresher.shared.core.errors import ConfigError

Write = Callable[[Path, Path], Path]
Play = Callable[..., dict[str, Any]]
N_SHARDS = 11  # of 8 contexts, in chunks of 4, the last of 3: most of their edges are within a batch of 5


@pytest.fixture
def toml(ranks_config: Write, model_folder: Path, text_folder: Path) -> Path:
    return ranks_config(model_folder, text_folder)


def test_any_number_of_ranks_leaves_the_bytes_of_one_process(toml: Path, play_ranks: Play) -> None:
    result = play_ranks(toml, "quick")
    assert result["problems"] == []
    two, three, rank_killed, first_killed, _ = result["notes"]
    for world, made in ((2, two), (3, three)):
        pairs = sorted(tuple(map(int, line.split())) for line in made.splitlines())
        assert pairs == sorted((shard % world, shard) for shard in range(N_SHARDS))
    assert "error: rank 1 is gone; what was harvested is kept: run the same command again" in rank_killed
    assert "error: rank 1 stops: another rank ended or cannot be reached; what was harvested" in first_killed


@pytest.mark.long
def test_any_number_of_ranks_resumes_after_kills_at_random_moments(toml: Path, play_ranks: Play) -> None:
    result = play_ranks(toml, "random")
    assert result["problems"] == []
    assert sum("-9" in note for note in result["notes"]) >= 20


def test_torchrun_starts_ranks(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    for name in ("one", "two"):
        (toml.parent / name).mkdir()
    options = ["--standalone", "--nproc-per-node", "2", "-m", "thresher.harvest", str(toml)]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    done = subprocess.run(command, cwd=toml.parent / "two", capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("stored 664 rows at 2 hook points in 'store'") == 1
    monkeypatch.chdir(toml.parent / "one")
    harvest(load_config(HarvestConfig, str(toml), []))
    assert files_of(toml.parent / "two") == files_of(toml.parent / "one")


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_rank_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    ranks = []
    for local_rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        ranks.append(RankGroup(4 + local_rank, 8, HashStore(), None))
    assert [rank_device(device, ranks[1]) for device in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert chosen == ["cuda:1", "cuda:1"]
    with pytest.raises(
        ConfigError,
        match="3 processes were started on a machine with 2 CUDA devices; start at most one for each device",
    ):
        rank_device("auto", ranks[2])
    with pytest.raises(ConfigError, match="device is 'cuda:0', but each of 3 processes needs its own"):
        rank_device("cuda:0", ranks[1])
    assert rank_device("auto", RankGroup(0, 1, HashStore(), None)) == "cuda"
