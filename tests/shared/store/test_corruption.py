"""Injured stores: every injury is found by verify, and no injured value is ever read as a good one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import StoreError, ThresherError
from thresher.shared.store.command import main

HOOKS = {"a": 12, "b": 5}
CONTEXT, N = 8, 40


@pytest.fixture(scope="module", params=["lz4", "none"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a good store of three shards; in the raw one all shards have the same index."""
    path = tmp_path_factory.mktemp("whole") / "s"
    generator = torch.Generator().manual_seed(0)
    settings = {"chunk_bytes": 200, "shard_bytes": 3000, "codec": request.param, "metadata": {"model": "m"}}
    with ActivationStoreWriter(path, HOOKS, CONTEXT, **settings) as writer:
        for i in range(0, N, 10):
            rows = {name: torch.randn(10, CONTEXT, d, generator=generator) for name, d in HOOKS.items()}
            documents = torch.arange(i, i + 10)[:, None].expand(-1, CONTEXT)
            tokens = torch.randint(0, 9, (10, CONTEXT), generator=generator)
            writer.append(rows, tokens, documents=documents, held_out=documents[:, 0] % 7 == 0)
    return path


def everything(path: Path) -> dict[str, np.ndarray]:
    """Read all that a store gives."""
    store = ActivationStore.open(path)
    found = {name: store.read(name, 0, store.n_rows).view(torch.int16).numpy() for name in store.hook_points}
    found["tokens"] = store.tokens(0, store.n_rows).numpy()
    found["held_out"] = store.held_out_contexts()
    found["mean"] = store.moments("a").mean
    found["training"] = store.training_rows_per_chunk()
    found["documents"] = np.stack(store.documents(0, store.n_rows))
    found["shape"] = np.array([store.n_rows, store.context_size, store.chunk_rows, store.complete])
    found["model"] = np.array([str(store.metadata)])
    return found


def injure(path: Path, rng: random.Random) -> str:
    """Injure one file of a store; return what was done."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "flip", "truncate", "extend", "remove", "swap", "zero"])
    at = rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[at:]
    elif kind == "extend":
        content += rng.randbytes(rng.randrange(1, 40))
    elif kind == "zero":
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    elif kind == "swap":
        other = rng.choice([p for p in files if p.suffix == file.suffix and p != file] or files)
        content, kept = bytearray(other.read_bytes()), bytes(content)
        other.write_bytes(kept)
    if kind == "remove":
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{kind} {file.relative_to(path)} at {at}"


def contents(path: Path) -> dict[Path, bytes]:
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def assert_found(whole: Path, path: Path, what: str, good: dict[str, np.ndarray]) -> bool:
    """Check that an injury is named, and that what can still be read is right; return whether it was one."""
    if contents(path) == contents(whole):
        return False
    try:
        faults = ActivationStore.open(path).verify()
    except ThresherError as error:
        faults = [str(error)]
    assert faults, f"not found by verify: {what}"
    assert not any("\n" in fault for fault in faults)
    try:
        assert_equal_or_shorter(everything(path), good, what)
    except ThresherError:
        pass
    return True


def assert_equal_or_shorter(found: dict[str, np.ndarray], good: dict[str, np.ndarray], what: str) -> None:
    """Check values that were read: all right, or, of a cut manifest, an unfinished store's right beginning."""
    if found["shape"][-1]:
        for name, values in good.items():
            np.testing.assert_array_equal(found[name], values, err_msg=f"{what}: {name}")
        return
    assert "manifest" in what
    for name in ("a", "b", "tokens", "held_out"):
        np.testing.assert_array_equal(found[name], good[name][: len(found[name])], err_msg=f"{what}: {name}")


def injure_many(whole: Path, tmp_path: Path, count: int, seed: int) -> int:
    good = everything(whole)
    rng = random.Random(seed)
    injuries = 0
    while injuries < count:
        path = tmp_path / "injured"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        what = injure(path, rng)
        injuries += assert_found(whole, path, what, good)
    return injuries


def test_random_injuries_are_found(whole: Path, tmp_path: Path) -> None:
    assert injure_many(whole, tmp_path, 60, seed=5) == 60


@pytest.mark.long
def test_many_random_injuries_are_found(whole: Path, tmp_path: Path) -> None:
    assert injure_many(whole, tmp_path, 1000, seed=6) == 1000


def test_shards_of_equal_shape_that_were_swapped_are_found(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    shutil.copytree(whole, path)
    first, second = path / "a" / "c.0.0", path / "a" / "c.1.0"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(StoreError, match=r"'a/c\.0\.0' has "):
        ActivationStore.open(path).read("a", 0, 3)
    assert len(ActivationStore.open(path).verify()) == 2


def test_a_fault_names_shard_chunk_and_rows(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    shutil.copytree(whole, path)
    assert main(["verify", str(path)]) == 0
    assert "320 rows" in capsys.readouterr().out
    content = bytearray((path / "a" / "c.1.0").read_bytes())
    content[3] ^= 8
    (path / "a" / "c.1.0").write_bytes(content)
    assert main(["verify", str(path)]) == 1
    store = ActivationStore.open(path)
    rows = rf"rows {store.shard_rows} to {store.shard_rows + store.chunk_rows - 1}"
    assert f"'a/c.1.0', chunk 0: the data does not have its checksum ({rows})" in capsys.readouterr().out
    store.read("a", 0, store.shard_rows)
    with pytest.raises(StoreError, match=r"'a/c\.1\.0', chunk 0: the data does not have its checksum"):
        store.read("a", store.shard_rows, store.shard_rows + 1)


def test_first_checks_once_and_always_each_time(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    shutil.copytree(whole, path)
    stores = {verify: ActivationStore.open(path, verify=verify) for verify in ("first", "always", "never")}
    for store in stores.values():
        store.read("a", 0, 8)
    with (path / "a" / "c.0.0").open("r+b") as file:
        file.seek(20)
        byte = file.read(1)[0]
        file.seek(20)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreError, match="does not have its checksum"):
        stores["always"].read("a", 0, 8)
    with pytest.raises(StoreError, match="does not have its checksum"):
        ActivationStore.open(path).read("a", 0, 8)
    if stores["never"].codec == "none":
        stores["never"].read("a", 0, 8)
        stores["first"].read("a", 0, 8)
