"""A harvest with a model that accelerate spreads over the host's memory and the disk writes the same store."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared.store import ActivationStore


def test_a_harvest_with_a_spread_model_writes_the_same_rows(config: HarvestConfig, tmp_path: Path) -> None:
    plain = ActivationStore.open(harvest(config))
    memory = {"cpu": "30KB"}  # of 58 KB
    settings = {"device_map": "auto", "max_memory": memory, "store": str(tmp_path / "spread")}
    spread = ActivationStore.open(harvest(msgspec.structs.replace(config, **settings)))
    assert spread.manifest.shards == plain.manifest.shards
    assert spread.metadata == plain.metadata
