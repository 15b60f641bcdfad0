"""What a store gives back equals what went in: by our reader, zarr-python and tensorstore."""

from __future__ import annotations

import json
from pathlib import Path

import dask.array
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import ConfigError, HookPointError
from thresher.shared.store.bfloat16 import register_bfloat16
from thresher.shared.store.format.layout import choose_chunk_rows, choose_shard_rows

register_bfloat16()

HOOK_POINTS = {"blocks.0.resid_post": 20, "blocks.11.mlp_out": 7}
CONTEXT = 24
N = 37


def activations(n: int = N, context: int = CONTEXT, hook_points: dict[str, int] = HOOK_POINTS, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, context, d, generator=generator) * 3 for name, d in hook_points.items()}


def some_tokens(n: int = N, context: int = CONTEXT):
    return torch.randint(0, 50, (n, context), generator=torch.Generator().manual_seed(9))


def write(path: Path, data: dict[str, torch.Tensor], tokens=None, *, batch: int = 5, **settings) -> ActivationStore:
    n, context, _ = next(iter(data.values())).shape
    hook_points = {name: part.shape[2] for name, part in data.items()}
    settings = {"chunk_bytes": 1000, "shard_bytes": 10_000} | settings
    with ActivationStoreWriter(path, hook_points, context, **settings) as writer:
        for i in range(0, n, batch):
            part = {name: rows[i : i + batch] for name, rows in data.items()}
            writer.append(part, None if tokens is None else tokens[i : i + batch])
    return ActivationStore.open(path)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_reader_gives_back_what_was_written(tmp_path: Path, codec: str, dtype: str) -> None:
    data, tokens = activations(), some_tokens()
    store = write(tmp_path / "s", data, tokens, codec=codec, dtype=dtype)
    assert store.complete
    assert (store.n_rows, store.n_contexts, store.context_size) == (N * CONTEXT, N, CONTEXT)
    assert len(store.manifest.shards) > 1, "the test must cross shards"
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert sorted(name for name, _ in group.members()) == sorted([*HOOK_POINTS, "tokens"])
    for name, rows in data.items():
        expected = rows.reshape(-1, rows.shape[2]).to(getattr(torch, dtype))
        assert torch.equal(store.read(name, 0, store.n_rows), expected)
        by_zarr = np.ascontiguousarray(group[name][:])
        opened = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/s/{name}"}).result()
        by_tensorstore = np.ascontiguousarray(opened.read().result())
        np.testing.assert_array_equal(by_zarr.view(np.uint8), bits(expected))
        np.testing.assert_array_equal(by_tensorstore.view(np.uint8), bits(expected))
    np.testing.assert_array_equal(group["tokens"][:], tokens.reshape(-1))
    assert torch.equal(store.tokens(13, 800), tokens.reshape(-1)[13:800].int())
    assert store.verify() == []


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 20),
    context=st.integers(1, 33),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    batch=st.integers(1, 41),
    chunk_bytes=st.integers(100, 3000),
    shard_bytes=st.integers(1000, 20_000),
    data=st.data(),
)
def test_odd_shapes_round_trip(tmp_path_factory, n, context, widths, batch, chunk_bytes, shard_bytes, data) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    rows = activations(n, context, {f"h{i}": d for i, d in enumerate(widths)})
    store = write(path, rows, batch=batch, chunk_bytes=chunk_bytes, shard_bytes=shard_bytes)
    start = data.draw(st.integers(0, store.n_rows))
    stop = data.draw(st.integers(start, store.n_rows))
    chunks = data.draw(st.lists(st.integers(0, store.n_chunks - 1), max_size=5))
    group = zarr.open_group(path, mode="r")
    for name, part in rows.items():
        expected = part.reshape(-1, part.shape[2]).bfloat16()
        assert torch.equal(store.read(name, start, stop), expected[start:stop])
        np.testing.assert_array_equal(group[name][:].view(np.int16), expected.view(torch.int16).numpy())
        padded = torch.cat([expected, torch.zeros(store.chunk_rows, part.shape[2]).bfloat16()])
        wanted = [padded[c * store.chunk_rows : (c + 1) * store.chunk_rows] for c in chunks]
        if wanted:
            out = torch.full((len(chunks) * store.chunk_rows, part.shape[2]), float("nan"), dtype=torch.bfloat16)
            assert store.read_chunks(name, chunks, out) is out
            assert torch.equal(out, torch.cat(wanted))


def test_the_bytes_do_not_depend_on_batches_or_threads(tmp_path: Path) -> None:
    data, tokens = activations(), some_tokens()
    trees = []
    for i, (batch, threads, pending) in enumerate([(1, 1, 1), (5, 4, 1 << 20), (37, 2, 3000)]):
        path = tmp_path / str(i)
        write(path, data, tokens, batch=batch, threads=threads, pending_bytes=pending)
        trees.append({p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()})
    assert trees[0] == trees[1] == trees[2]
    assert not any(str(tmp_path).encode() in content for content in trees[0].values())


def test_sources_of_any_float_type_are_rounded_to_nearest(tmp_path: Path) -> None:
    exact = torch.randn(4, 8, 16, dtype=torch.float64)
    sources = {
        "double": exact,
        "single": exact.float(),
        "half": exact.half(),
        "array": exact.numpy(),
        "big_endian": exact.numpy().astype(">f4"),
        "ml": exact.numpy().astype(ml_dtypes.bfloat16),
        "strided": torch.stack([exact, exact], dim=-1)[..., 0],
    }
    with ActivationStoreWriter(tmp_path / "s", dict.fromkeys(sources, 16), 8) as writer:
        writer.append(sources)
    store = ActivationStore.open(tmp_path / "s")
    for name, rows in sources.items():
        expected = np.asarray(rows).astype(ml_dtypes.bfloat16).reshape(-1, 16)
        np.testing.assert_array_equal(store.read(name, 0, 32).view(torch.int16).numpy(), expected.view(np.int16))


def test_int8_is_within_half_a_step_and_readable_elsewhere(tmp_path: Path) -> None:
    data = activations()
    data["blocks.0.resid_post"][3, 4] = 0
    store = write(tmp_path / "s", data, codec="int8", dtype="float32")
    group = zarr.open_group(tmp_path / "s", mode="r")
    for name, rows in data.items():
        exact = rows.reshape(-1, rows.shape[2])
        read = store.read(name, 0, store.n_rows)
        step = exact.abs().amax(1, keepdim=True) / 96
        assert ((read - exact).abs() <= step * 0.5001).all()
        by_zarr = group[name][:].astype(np.float32) * group[f"scales/{name}"][:][:, None]
        np.testing.assert_array_equal(by_zarr, read.numpy())
    assert store.verify() == []


def test_a_store_without_tokens_and_an_empty_one(tmp_path: Path) -> None:
    store = write(tmp_path / "s", activations())
    assert store.tokens(0, 5) is None
    assert store.row_mask(0, store.n_rows).all()
    with ActivationStoreWriter(tmp_path / "empty", HOOK_POINTS, CONTEXT):
        pass
    empty = ActivationStore.open(tmp_path / "empty")
    assert (empty.n_rows, empty.n_chunks, empty.complete, empty.verify()) == (0, 0, True, [])
    assert empty.read("blocks.0.resid_post", 0, 0).shape == (0, 20)
    assert zarr.open_group(tmp_path / "empty", mode="r")["blocks.0.resid_post"].shape == (0, 20)


def test_zarr_python_would_write_the_same_metadata(tmp_path: Path) -> None:
    write(tmp_path / "s", activations())
    ours = zarr.open_array(tmp_path / "s" / "blocks.11.mlp_out", mode="r")
    ours_json = json.loads((tmp_path / "s" / "blocks.11.mlp_out" / "zarr.json").read_text())
    again = zarr.create_array(
        tmp_path / "again",
        shape=ours.shape,
        dtype=ours.dtype,
        shards=ours.shards,
        chunks=ours.chunks,
        serializer=zarr.codecs.BytesCodec(endian="little"),
        compressors=[
            zarr.codecs.BloscCodec(cname="lz4", clevel=9, shuffle="bitshuffle", typesize=2, blocksize=65536),
            zarr.codecs.Crc32cCodec(),
        ],
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=["row", "d_in_7"],
    )
    theirs = again.metadata.to_dict()
    theirs = json.loads((tmp_path / "again" / "zarr.json").read_text())
    theirs.pop("storage_transformers", None)
    assert ours_json == theirs


@pytest.mark.parametrize("codec", ["none", "lz4", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_put_where_they_are_wanted(tmp_path: Path, codec: str, dtype: str) -> None:
    store = write(tmp_path / "s", activations(), codec=codec, dtype=dtype, chunk_bytes=2000)
    rng = np.random.default_rng(0)
    for name, width in HOOK_POINTS.items():
        chunks = rng.permutation(store.n_chunks)
        rows = store.read_chunks(name, chunks)
        wanted = np.flatnonzero(rng.random(len(rows)) < 0.7)
        destinations = np.full(len(rows), -1)
        destinations[wanted] = rng.permutation(len(wanted) + 4)[: len(wanted)]
        out = torch.full((len(wanted) + 5, width), -7.0, dtype=store.dtype)
        expected = out.clone()
        expected[torch.from_numpy(destinations[wanted])] = rows[torch.from_numpy(wanted)]
        store.place_rows(name, chunks, destinations, out)
        assert torch.equal(out[:-1], expected[:-1])
    with pytest.raises(ConfigError, match=r"must hold .* numbers from -1 to 3"):
        store.place_rows(name, chunks, destinations, out[:4])


def test_hook_points_and_ranges_that_do_not_exist_are_named(tmp_path: Path) -> None:
    store = write(tmp_path / "s", activations())
    with pytest.raises(HookPointError, match=r"no hook point 'blocks\.5'; it has blocks\.0\.resid_post, blocks\.11"):
        store.read("blocks.5", 0, 1)
    with pytest.raises(ConfigError, match="expected rows within 0 to 888, got 3 to 889"):
        store.read("blocks.0.resid_post", 3, 889)
    with pytest.raises(ConfigError, match="expected chunks of 0 to 36"):
        store.read_chunks("blocks.0.resid_post", [0, 37])
    with pytest.raises(ConfigError, match=r"expected a contiguous torch\.bfloat16 CPU tensor of shape"):
        store.read_chunks("blocks.0.resid_post", [0], torch.empty(24, 20))


@given(
    row_bytes=st.integers(1, 1 << 17),
    context=st.integers(1, 1 << 14),
    chunk=st.integers(1, 1 << 21),
    shard=st.integers(1, 1 << 30),
)
def test_chunks_and_shards_divide_evenly(row_bytes: int, context: int, chunk: int, shard: int) -> None:
    chunk_rows = choose_chunk_rows(row_bytes, context, chunk)
    shard_rows = choose_shard_rows(chunk_rows, context, row_bytes, shard)
    assert shard_rows % chunk_rows == 0
    assert shard_rows % context == 0
    assert 1 <= chunk_rows <= max(1, chunk // row_bytes)
    if chunk >= row_bytes:
        assert chunk_rows >= chunk // row_bytes / 4


def test_the_default_geometry_is_as_documented() -> None:
    assert choose_chunk_rows(512, 256, 256 << 10) == 512
    assert choose_chunk_rows(8192, 1024, 256 << 10) == 32
    assert choose_shard_rows(512, 256, 512, 256 << 20) == 512 << 10


@pytest.mark.filterwarnings("default")  # those of the libraries' own
def test_dask_and_xarray_open_it_lazily(tmp_path: Path) -> None:
    data = activations()
    write(tmp_path / "s", data, some_tokens())
    expected = data["blocks.11.mlp_out"].reshape(-1, 7).bfloat16()
    bit_pattern = expected.view(torch.int16).numpy()
    lazy = dask.array.from_zarr(zarr.open_group(tmp_path / "s", mode="r")["blocks.11.mlp_out"])
    np.testing.assert_array_equal(lazy.compute().view(np.int16), bit_pattern)
    np.testing.assert_array_equal(lazy[100:200].compute().view(np.int16), bit_pattern[100:200])
    dataset = xarray.open_zarr(tmp_path / "s", consolidated=True)
    rows = dataset["blocks.11.mlp_out"]
    assert rows.chunks is not None, "rows are read when they are computed with"
    assert {name: part.dims for name, part in dataset.data_vars.items()} == {
        "blocks.0.resid_post": ("row", "d_in_20"),
        "blocks.11.mlp_out": ("row", "d_in_7"),
        "tokens": ("row",),
    }
    np.testing.assert_array_equal(rows.values.view(np.int16), bit_pattern)
    mean = rows.astype("float32").mean("row").compute().values
    np.testing.assert_allclose(mean, expected.double().mean(0).numpy(), rtol=1e-4, atol=1e-6)
