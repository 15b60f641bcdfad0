"""A harvest of a synthetic law: what is stored, resuming, extending, and settings that do not apply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from thresher.harvest import HarvestConfig, harvest, synthetic
from thresher.shared.core.errors import ConfigError, StoreError
from thresher.shared.store import ActivationStore
from thresher.shared.synthetic.law import LAWS, SyntheticLaw
from thresher.shared.synthetic.sampler import Sampler
from thresher.shared.synthetic.truth import make_truth

LAW = SyntheticLaw(n_features=100, d_in=16, n_roots=2, orthogonalisation_steps=3, seed=3)


@pytest.fixture(autouse=True)
def tiny_law(monkeypatch):
    monkeypatch.setitem(LAWS, "tiny", LAW)
    monkeypatch.setattr(synthetic, "BATCH_ROWS", 256)


def config(store, **changes):
    settings = {"tokens": 8192, "context_size": 64, "holdout_fraction": 0.2, "chunk_bytes": 4096, "shard_bytes": 32768}
    return HarvestConfig(model="synthetic:tiny", hook_points=["features"], store=str(store), **(settings | changes))


def files(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name != "harvest.toml"
    }


def test_rows_are_those_of_the_sampler(tmp_path):
    harvest(config(tmp_path / "store", dtype="float32", chunk_bytes=16384))
    store = ActivationStore.open(tmp_path / "store")
    assert (store.n_rows, store.has_tokens) == (8192, False)
    rows = store.read("features", 0, store.n_rows)
    sampler = Sampler(make_truth(LAW))
    batches = [sampler.rows(256, synthetic._seed(0, "rows", number)) for number in range(32)]
    assert torch.equal(rows, torch.cat(batches))
    per_chunk = store.manifest.header.chunk_rows // 64
    held_out = store.held_out_contexts().tolist()
    assert 0.05 < sum(held_out) / len(held_out) < 0.4
    assert per_chunk == 4
    groups = [set(held_out[first : first + per_chunk]) for first in range(0, len(held_out), per_chunk)]
    assert all(len(group) == 1 for group in groups)


def test_an_interrupted_harvest_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    harvest(config(tmp_path / "whole"))
    rows, calls = Sampler.rows, []

    def fails(self, n, seed):
        calls.append(seed)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return rows(self, n, seed)

    with monkeypatch.context() as context:
        context.setattr(Sampler, "rows", fails)
        with pytest.raises(KeyboardInterrupt):
            harvest(config(tmp_path / "store", workers=1))
    assert 0 < ActivationStore.open(tmp_path / "store").n_rows < 8192
    harvest(config(tmp_path / "store"))
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_an_extended_store_equals_one_harvested_at_once(tmp_path):
    harvest(config(tmp_path / "whole", tokens=8192))
    harvest(config(tmp_path / "store", tokens=3000))
    harvest(config(tmp_path / "store", tokens=8192))
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_complete_store_is_reused_and_another_law_refused(tmp_path, monkeypatch, capsys):
    harvest(config(tmp_path / "store"))
    harvest(config(tmp_path / "store"))
    assert "reuses store" in capsys.readouterr().err
    with pytest.raises(StoreError, match="it differs in seed"):
        harvest(config(tmp_path / "store", seed=1))
    monkeypatch.setitem(LAWS, "tiny", replace(LAW, seed=4))
    with pytest.raises(StoreError, match="it differs in weights"):
        harvest(config(tmp_path / "store"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_points": ["blocks.0.resid_post"]}, r"expected \['features'\]"),
        ({"dataset": "text.jsonl", "bos_token": "x"}, "dataset, bos_token: expected none of these"),
        ({"model": "synthetic:other"}, "no synthetic law 'other'"),
    ],
)
def test_settings_that_do_not_apply_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        harvest(replace(config(tmp_path / "store"), **changes))
    assert not (tmp_path / "store").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="drawn in one process, got 2"):
        harvest(config(tmp_path / "store"))
