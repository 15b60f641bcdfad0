"""Moments, masks and provenance, held against NumPy's float64 over the rows that the store gives back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.format.bits import TORCH_DTYPES, float64_blocks, to_bits
from thresher.shared.store.format.moments import Moments, merge_moments
from thresher.shared.store.format.provenance import decode_segments, encode_segments, expand_segments, find_segments

CONTEXT = 16


def write(path: Path, codec: str = "lz4", n: int = 53, dtype: str = "bfloat16") -> ActivationStore:
    """Write a store in which every fifth context is held out and tokens 1 and 3 are masked."""
    generator = torch.Generator().manual_seed(3)
    rows = {
        "a": torch.randn(n, CONTEXT, 24, generator=generator) * 5 + torch.arange(24) * 10,
        "b": torch.randn(n, CONTEXT, 5, generator=generator),
    }
    tokens = torch.randint(0, 9, (n, CONTEXT), generator=generator)
    settings = {"chunk_bytes": 700, "shard_bytes": 9000, "mask_token_ids": [3, 1]}
    with ActivationStoreWriter(path, {"a": 24, "b": 5}, CONTEXT, codec=codec, dtype=dtype, **settings) as writer:
        for i in range(0, n, 7):
            part = {name: values[i : i + 7] for name, values in rows.items()}
            writer.append(part, tokens[i : i + 7], held_out=np.arange(n)[i : i + 7] % 5 == 2)
    return ActivationStore.open(path)


@pytest.mark.parametrize(
    ("codec", "dtype"), [("lz4", "bfloat16"), ("none", "float16"), ("zstd", "float32"), ("int8", "bfloat16")]
)
def test_moments_are_exact_over_the_training_rows(tmp_path: Path, codec: str, dtype: str) -> None:
    store = write(tmp_path / "s", codec, dtype=dtype)
    tokens = store.tokens(0, store.n_rows).numpy()
    held_out = np.arange(store.n_contexts) % 5 == 2
    training = ~np.isin(tokens, [1, 3]) & ~np.repeat(held_out, CONTEXT)
    np.testing.assert_array_equal(store.held_out_contexts(), held_out)
    np.testing.assert_array_equal(store.training_mask(0, store.n_rows), training)
    np.testing.assert_array_equal(store.training_mask(100, 333), training[100:333])
    starts = np.arange(0, store.n_rows, store.chunk_rows)
    np.testing.assert_array_equal(store.training_rows_per_chunk(), np.add.reduceat(training.astype(int), starts))
    for name in store.hook_points:
        rows = store.read(name, 0, store.n_rows).double().numpy()[training]
        moments = store.moments(name)
        assert moments.count == len(rows)
        np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(moments.variance, rows.var(axis=0), rtol=1e-10)
        np.testing.assert_allclose(moments.total_variance, rows.var(axis=0).sum(), rtol=1e-10)
        np.testing.assert_allclose(moments.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-10)


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 2**32 - 1))
def test_moments_merge_whatever_the_parts(sizes: list[int], seed: int) -> None:
    parts = [np.random.default_rng(seed + i).normal(100, 0.01, (size, 3)) for i, size in enumerate(sizes)]
    rows = np.concatenate([np.zeros((0, 3)), *parts])
    moments = merge_moments([Moments.of([part.copy()], 3) for part in parts], 3)
    assert moments.count == len(rows)
    if len(rows):
        np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, rows.var(axis=0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 3), (700, 129), (5, 40_000)])
def test_moments_of_any_shape_equal_numpys(shape: tuple[int, int], dtype: str) -> None:
    # Means of up to 2000 deviations, one channel constant, and a first block far from the rest.
    rng = np.random.default_rng(7)
    rows = rng.normal(size=shape) + np.geomspace(0.01, 2000, shape[1])
    rows[: shape[0] // 3] -= 500
    rows[:, 1] = 3.0
    bits = to_bits(torch.from_numpy(rows), dtype, "a")
    moments = Moments.of(float64_blocks(bits, dtype), shape[1])
    exact = torch.from_numpy(rows).to(TORCH_DTYPES[dtype]).double().numpy().astype(np.longdouble)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(moments.variance, exact.var(axis=0), rtol=1e-10, atol=1e-20)
    np.testing.assert_allclose(moments.mean_norm, np.linalg.norm(exact, axis=1).mean(), rtol=1e-12)


def test_moments_are_the_same_bits_in_any_thread_and_at_any_address(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(3, 2, (300, CONTEXT, 200)).astype(np.float32)
    contents = set()
    for threads, offset in [(1, 0), (2, 1), (5, 3)]:
        shifted = np.empty(rows.size + offset, np.float32)[offset:].reshape(rows.shape)
        shifted[:] = rows
        path = tmp_path / str(threads)
        with ActivationStoreWriter(path, {"a": 200}, CONTEXT, dtype="float32", threads=threads) as writer:
            writer.append({"a": shifted})
        contents.add((path / "statistics.safetensors").read_bytes())
        bits = shifted.reshape(-1, 200).view(np.uint32)
        contents.add(Moments.of(float64_blocks(bits, "float32"), 200).M2.tobytes())
    assert len(contents) == 2


def test_documents_and_positions_come_back(tmp_path: Path) -> None:
    # Document 7 crosses two contexts and a shard; -1 marks rows of none; document 8 starts anew in its context.
    documents = np.repeat([[7, 7, -1, 8], [8, 8, 9, 9], [9, 9, 9, 10]], 2, axis=1)
    positions = np.array([[0, 1, 2, 3, -1, -1, 0, 1], [2, 3, 4, 5, 0, 1, 9, 10], [11, 12, 13, 14, 15, 16, 0, 1]])
    info = {7: (2**64 - 1, "one.py"), 9: (5, "ünïcode\n.py"), 99: (1, "not here")}
    with ActivationStoreWriter(tmp_path / "s", {"a": 2}, 8, chunk_bytes=32, shard_bytes=32) as writer:
        for i in range(3):
            one = slice(i, i + 1)
            batch = {"a": torch.zeros(1, 8, 2)}
            writer.append(
                batch, documents=documents[one], positions=positions[one], held_out=[i == 1], document_info=info
            )
    store = ActivationStore.open(tmp_path / "s")
    assert len(store.manifest.shards) == 3
    for start, stop in [(0, 24), (3, 20), (8, 16), (5, 5)]:
        document, position = store.documents(start, stop)
        np.testing.assert_array_equal(document, documents.reshape(-1)[start:stop])
        np.testing.assert_array_equal(position, positions.reshape(-1)[start:stop])
    assert store.document_info(7) == (2**64 - 1, "one.py")
    assert store.document_info(9) == (5, "ünïcode\n.py")
    assert store.document_info(8) == (None, None)
    table = pq.read_table(tmp_path / "s" / "provenance" / "00001.parquet").to_pylist()
    assert [
        (row["context"], row["held_out"], row["offset"], row["length"], row["document"], row["position"])
        for row in table
    ] == [
        (1, True, 0, 4, 8, 2),
        (1, True, 4, 2, 9, 0),
        (1, True, 6, 2, 9, 9),
    ]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_segments_expand_to_what_they_were_found_in(n: int, size: int, seed: int, known: bool) -> None:
    rng = np.random.default_rng(seed)
    documents = np.sort(rng.integers(-1, 3, (n, size)), axis=1)
    positions = rng.integers(0, 3, (n, size)) if known else np.full((n, size), -1)
    segments = find_segments(documents, positions, np.zeros(n, dtype=bool), 10)
    document, position = expand_segments(decode_segments(encode_segments(segments, {})))
    np.testing.assert_array_equal(document, documents.reshape(-1))
    np.testing.assert_array_equal(position, positions.reshape(-1))
    assert segments.length.sum() == n * size
    assert segments.context.min() == 10
