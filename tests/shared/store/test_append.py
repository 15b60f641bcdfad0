"""What the writer may keep of a caller's arrays, and that its own buffers never mix rows up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.write.assembly import ChunkBuffers

CONTEXT, N = 8, 61
HOOK_POINTS = {"a": 6, "b": 3}


def rows_of(start: int, stop: int) -> dict[str, np.ndarray]:
    return {
        name: np.random.default_rng(d).normal(size=(N, CONTEXT, d)).astype(np.float32)[start:stop]
        for name, d in HOOK_POINTS.items()
    }


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(
    path: Path, batch: int, codec: str, *, copy: bool, spoil: bool = False, threads: int = 3
) -> dict[Path, bytes]:
    settings = {"dtype": "float32", "codec": codec, "chunk_bytes": 2 * CONTEXT * 6 * 4, "shard_bytes": 4000}
    with ActivationStoreWriter(path, HOOK_POINTS, CONTEXT, threads=threads, **settings) as writer:
        for start in range(0, N, batch):
            rows = {name: part.copy() for name, part in rows_of(start, min(start + batch, N)).items()}
            writer.append(rows, copy=copy)
            if spoil:
                for part in rows.values():
                    part[:] = -1e9
    return files_of(path)


@pytest.mark.parametrize("codec", ["none", "lz4", "int8"])
def test_rows_that_are_kept_give_the_same_store_as_rows_that_are_copied(tmp_path: Path, codec: str) -> None:
    expected = write(tmp_path / "copied", 5, codec, copy=True)
    for batch in (1, 2, 7, 16, N):
        assert write(tmp_path / f"kept-{batch}", batch, codec, copy=False) == expected
    if codec != "int8":
        store = ActivationStore.open(tmp_path / "kept-7")
        for name, rows in rows_of(0, N).items():
            np.testing.assert_array_equal(store.read(name, 0, store.n_rows).numpy(), rows.reshape(-1, rows.shape[2]))


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_a_caller_may_fill_its_arrays_again(tmp_path: Path, codec: str) -> None:
    expected = write(tmp_path / "a", 8, codec, copy=True)
    assert write(tmp_path / "b", 8, codec, copy=True, spoil=True) == expected


def test_buffers_are_used_again_by_shape_and_type() -> None:
    buffers = ChunkBuffers()
    first = buffers.take((4, 3), np.dtype("<u2"))
    assert buffers.take((4, 3), np.dtype("<u2")) is not first
    buffers.give_back(first)
    assert buffers.take((4, 3), np.dtype("<u4")) is not first
    assert buffers.take((3, 4), np.dtype("<u2")) is not first
    assert buffers.take((4, 3), np.dtype("<u2")) is first
    assert buffers.take((4, 3), np.dtype("<u2")) is not first
