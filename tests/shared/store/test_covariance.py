"""Covariance: of the rows as they are read, whatever the batches, shards, threads and the BLAS's own threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import StoreError
from thresher.shared.store.format.covariance import Products, merge_co_moments
from thresher.shared.store.format.moments import Moments
from thresher.shared.store.read.inspect import describe

CONTEXT = 16
HOOK_POINTS = {"a": 70, "b": 5}


def write(path: Path, codec: str = "lz4", batch: int = 7, n: int = 53, **settings) -> ActivationStore:
    generator = torch.Generator().manual_seed(3)
    mixing = {name: torch.randn(d, d, generator=generator) for name, d in HOOK_POINTS.items()}
    rows = {
        name: torch.randn(n, CONTEXT, d, generator=generator) @ mixing[name] + torch.arange(d) * 10
        for name, d in HOOK_POINTS.items()
    }
    tokens = torch.randint(0, 9, (n, CONTEXT), generator=generator)
    settings = {"chunk_bytes": 5000, "shard_bytes": 30_000, "mask_token_ids": [3], "covariance": True} | settings
    with ActivationStoreWriter(path, HOOK_POINTS, CONTEXT, codec=codec, **settings) as writer:
        for i in range(0, n, batch):
            part = {name: values[i : i + batch] for name, values in rows.items()}
            writer.append(part, tokens[i : i + batch], held_out=np.arange(n)[i : i + batch] % 5 == 2)
    return ActivationStore.open(path)


@pytest.mark.parametrize("codec", ["lz4", "int8"])
def test_covariance_equals_numpys_over_the_training_rows(tmp_path: Path, codec: str) -> None:
    store = write(tmp_path / "s", codec)
    assert len(store.manifest.shards) > 2
    for name, d_in in HOOK_POINTS.items():
        rows = store.read(name, 0, store.n_rows).double().numpy()[store.training_mask(0, store.n_rows)]
        expected = np.cov(rows, rowvar=False, bias=True)
        scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
        got = store.covariance(name)
        assert got.shape == (d_in, d_in)
        assert np.abs((got - expected) / scale).max() < 1e-10
        np.testing.assert_array_equal(got, got.T)
        np.testing.assert_allclose(got.diagonal(), store.moments(name).variance, rtol=1e-10)
    assert any("with covariance" in line for line in describe(store))
    assert store.verify() == []


def test_a_store_without_says_so_and_is_what_it_was(tmp_path: Path) -> None:
    store = write(tmp_path / "s", covariance=False)
    with pytest.raises(StoreError, match="keeps no covariance"):
        store.covariance("a")
    assert b"covariance" not in (tmp_path / "s" / "manifest.jsonl").read_bytes()
    assert not any("covariance" in line for line in describe(store))


def test_a_store_cannot_go_on_with_or_without(tmp_path: Path) -> None:
    for first in (True, False):
        path = tmp_path / str(first)
        writer = ActivationStoreWriter(path, {"a": 2}, 4, covariance=first)
        writer.append({"a": np.zeros((1, 4, 2), np.float32)})
        writer.abandon()
        with pytest.raises(StoreError, match="covariance"):
            ActivationStoreWriter(path, {"a": 2}, 4, covariance=not first)


@pytest.mark.parametrize("d_in", [1, 63, 64, 130])
def test_merging_gives_the_co_moment_of_all_rows(d_in: int) -> None:
    rng = np.random.default_rng(d_in)
    parts = [rng.normal(50, 0.1, (n, d_in)) for n in (0, 1, 25, 0, 200)]
    moments, co_moment = Moments.none(d_in), np.zeros((d_in, d_in))
    for part in parts:
        of_part, products = Moments.of([part.copy()], d_in), Products(d_in)
        products.add([part], of_part)
        co_moment = merge_co_moments(co_moment, moments, products.co_moment(of_part), of_part)
        moments = moments + of_part
    rows = np.concatenate(parts).astype(np.longdouble)
    deviations = rows - rows.mean(axis=0)
    expected = deviations.T @ deviations
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.abs((co_moment - expected) / scale).max() < 1e-10


BYTES = """
import zlib
import numpy as np
from thresher.shared.store.format.covariance import Products
from thresher.shared.store.format.moments import Moments
rows = np.random.default_rng(0).normal(3, 2, (500, 200))
products, moments = Products(200), Moments.of([rows.copy()], 200)
products.add([rows], moments)
print(zlib.crc32(products.co_moment(moments).tobytes()), moments.sum_norm.hex())
"""


def test_the_bits_do_not_depend_on_the_blas_threads() -> None:
    found = set()
    for threads in ("1", "2"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", BYTES], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        found.add(done.stdout)
    assert len(found) == 1


def test_the_bytes_do_not_depend_on_batches_or_threads(tmp_path: Path) -> None:
    write(tmp_path / "a", batch=7, threads=1)
    write(tmp_path / "b", batch=11, threads=4)
    for file in ("statistics.safetensors", "manifest.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
