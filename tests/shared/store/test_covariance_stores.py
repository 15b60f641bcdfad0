"""Stores that an earlier version wrote with covariances: they open and verify, and are not resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors import numpy as tensors

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import StoreError
from thresher.shared.store.format.layout import STATISTICS, statistics_key
from thresher.shared.store.format.manifest import FileRecord, encode_line, read_manifest
from thresher.shared.store.format.zarr_metadata import metadata_files

HOOK_POINTS = {"a": 6, "b": 3}


def write(path: Path) -> None:
    rows = {name: torch.randn(20, 4, d, generator=torch.Generator().manual_seed(d)) for name, d in HOOK_POINTS.items()}
    with ActivationStoreWriter(path, HOOK_POINTS, 4, chunk_bytes=50, shard_bytes=200) as writer:
        writer.append(rows, torch.arange(80).reshape(20, 4))


def add_covariances(path: Path) -> None:
    """Make a store the one that the earlier version wrote with `covariance=True`."""
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.completion is not None
    header = replace(manifest.header, covariance=True)

    def with_products(key: str) -> FileRecord:
        arrays = tensors.load_file(path / key)
        arrays |= {f"{name}/C": np.eye(d) for name, d in HOOK_POINTS.items()}
        tensors.save_file(arrays, path / key)
        return FileRecord.of((path / key).read_bytes())

    shards = []
    for shard in manifest.shards:
        key = statistics_key(shard.shard)
        shards.append(replace(shard, files=shard.files | {key: with_products(key)}))
    files = {STATISTICS: with_products(STATISTICS)}
    for key, content in metadata_files(header, manifest.n_contexts * 4).items():
        (path / key).write_bytes(content)
        files[key] = FileRecord.of(content)
    content, checksum = b"", 0
    for entry in (header, *shards, replace(manifest.completion, files=files)):
        line, checksum = encode_line(entry, checksum)
        content += line
    (path / "manifest.jsonl").write_bytes(content)


def test_a_store_with_covariances_is_read_and_verified_but_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write(path)
    plain = ActivationStore.open(path)
    expected = {name: (plain.moments(name).M2, plain.read(name, 0, plain.n_rows)) for name in HOOK_POINTS}
    add_covariances(path)
    store = ActivationStore.open(path)
    assert len(store.manifest.shards) > 2
    assert b'"covariance":true' in (path / "manifest.jsonl").read_bytes()
    assert store.verify() == []
    for name, (M2, rows) in expected.items():
        np.testing.assert_array_equal(store.moments(name).M2, M2)
        assert torch.equal(store.read(name, 0, store.n_rows), rows)
    with pytest.raises(StoreError, match="keeps covariances, which this version can read but not write"):
        ActivationStoreWriter(path, HOOK_POINTS, 4, chunk_bytes=50, shard_bytes=200)


def test_the_covariances_are_still_checked(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write(path)
    add_covariances(path)
    file = path / statistics_key(0)
    content = bytearray(file.read_bytes())
    at = content.index(np.eye(6).tobytes()[:64])
    content[at] ^= 1
    file.write_bytes(content)
    (fault,) = ActivationStore.open(path).verify()
    assert "statistics/00000.safetensors" in fault
    assert "does not have its checksum" in fault
