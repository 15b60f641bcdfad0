"""The stream gives every training row once per epoch, and goes on exactly where it was left."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thresher.shared import ActivationStoreWriter
from thresher.shared.core.errors import ConfigError, HookPointError, StoreError
from thresher.train import ShuffledBatches

WIDTH = 3
CHUNK_BYTES = 4 * WIDTH * 4


@pytest.fixture
def numbered(array_store):
    """Return a function that makes a store whose rows hold their own number."""

    def make(n_contexts=9, chunk_rows=4, **masks):
        n_rows = n_contexts * 8
        rows = torch.arange(n_rows, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous()
        return array_store({"a": rows, "b": rows + 0.5}, chunk_rows=chunk_rows, **masks)

    return make


def rows_of(batches, n):
    return [int(row) for _ in range(n) for row in next(batches)["a"][:, 0]]


@pytest.mark.parametrize("chunk_rows", [4, 5, 8, 16, 100])
@pytest.mark.parametrize("window_bytes", [1, 7 * CHUNK_BYTES, 1 << 20])
def test_every_training_row_once_per_epoch(numbered, chunk_rows, window_bytes):
    masks = {"held_out": np.arange(9) % 4 == 1, "masked": np.arange(72) % 11 == 3}
    store = numbered(chunk_rows=chunk_rows, **masks)
    expected = np.flatnonzero(store.training_mask()).tolist()
    with ShuffledBatches(store, ["a"], batch_size=7, window_bytes=window_bytes) as batches:
        assert batches.rows_per_epoch == len(expected)
        seen = rows_of(batches, 3 * len(expected) // 7 + 1)
    epochs = [seen[i * len(expected) : (i + 1) * len(expected)] for i in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_hook_points_of_a_batch_carry_the_same_rows(numbered):
    with ShuffledBatches(numbered(), batch_size=10, window_bytes=4 * CHUNK_BYTES) as batches:
        for _ in range(20):
            batch = next(batches)
            assert torch.equal(batch["a"] + 0.5, batch["b"])


@given(st.integers(0, 40), st.integers(1, 30), st.integers(0, 3))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resume_at_any_point_continues_the_same_stream(numbered, taken, batch_size, seed):
    store = numbered()
    options = {"batch_size": batch_size, "seed": seed, "window_bytes": 6 * CHUNK_BYTES}
    with ShuffledBatches(store, **options) as batches:
        rows_of(batches, taken)
        state = batches.state_dict()
        expected = rows_of(batches, 5)
    with ShuffledBatches(store, **options) as batches:
        batches.load_state_dict(state)
        assert rows_of(batches, 5) == expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window_bytes", [6 * CHUNK_BYTES, 1 << 20])
@pytest.mark.parametrize("n_batches", [3, 11, 14])
def test_a_stream_that_ends_gives_the_same_rows_and_decodes_no_chunk_beyond(
    numbered, monkeypatch, masked, window_bytes, n_batches
):
    store = numbered(**({"held_out": np.arange(9) % 4 == 1, "masked": np.arange(72) % 11 == 3} if masked else {}))
    options = {"batch_size": 6, "window_bytes": window_bytes}
    with ShuffledBatches(store, ["a"], **options) as endless:
        expected = rows_of(endless, n_batches)
    decoded = []
    place_rows = store.place_rows

    def counting(hook_point, chunks, *rest):
        decoded.extend(chunks.tolist())
        place_rows(hook_point, chunks, *rest)

    monkeypatch.setattr(store, "place_rows", counting)
    with ShuffledBatches(store, ["a"], **options, n_rows=6 * n_batches) as batches:
        assert [int(row) for batch in batches for row in batch["a"][:, 0]] == expected
        assert next(batches, None) is None
        per_epoch = batches.rows_per_epoch
    epochs = [expected[first : first + per_epoch] for first in range(0, len(expected), per_epoch)]
    assert sorted(decoded) == sorted(chunk for rows in epochs for chunk in {row // 4 for row in rows})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_partition_every_batch(numbered, world_size):
    store = numbered()
    with ShuffledBatches(store, ["a"], batch_size=24) as whole:
        expected = [rows_of(whole, 1) for _ in range(7)]
    ranks = [ShuffledBatches(store, ["a"], batch_size=24, rank=r, world_size=world_size) for r in range(world_size)]
    for batch in expected:
        assert [row for rank in ranks for row in rows_of(rank, 1)] == batch
    for rank in ranks:
        rank.close()


def test_errors_say_what_to_do(numbered):
    with pytest.raises(HookPointError, match=r"no hook point 'c'.*it has: a, b"):
        ShuffledBatches(numbered(), ["c"])
    with pytest.raises(StoreError, match="no training rows"):
        ShuffledBatches(numbered(held_out=np.ones(9, bool)))
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        ShuffledBatches(numbered(), batch_size=10, world_size=3)
    with ShuffledBatches(numbered(), seed=1) as batches, pytest.raises(ConfigError, match="seed 0"):
        batches.load_state_dict({"rows_taken": 0, "seed": 0})
    with ShuffledBatches(numbered(), seed=1) as batches, pytest.raises(ConfigError, match=r"version 1, .* version 2"):
        batches.load_state_dict({"rows_taken": 0, "seed": 1})


PEAK_OF_STREAM = """
import sys
from pathlib import Path
from thresher.shared import ActivationStore
from thresher.train import ShuffledBatches

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

store = ActivationStore.open(sys.argv[1])
store.read("a", 0, 1)  # loads what decoding needs
with ShuffledBatches(store, batch_size=512, window_bytes=32 << 20) as batches:
    before, peak = anonymous(), 0
    for _ in range(3 * batches.rows_per_epoch // 512):
        batch = next(batches)  # the one before is held until this one has come
        peak = max(peak, anonymous() - before)
print(peak)
"""


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"batch_size": -8},
        {"batch_size": 8.0},
        {"seed": -1},
        {"seed": None},
        {"rank": 2, "world_size": 2},
        {"rank": -1, "world_size": 2},
        {"world_size": 0},
        {"device": "xpu"},
    ],
)
def test_settings_that_no_stream_has_are_refused(numbered, change):
    with pytest.raises(ConfigError, match="expected"):
        ShuffledBatches(numbered(), ["a"], **{"batch_size": 8} | change)


def test_memory_stays_within_the_windows(tmp_path):
    """Of anonymous memory: mapped files are the page cache's, which gives them back."""
    megabyte = 1 << 20
    rows = torch.zeros(4, 256, 2048, dtype=torch.bfloat16)
    with ActivationStoreWriter(tmp_path / "s", {"a": 2048}, 256, codec="lz4") as writer:
        for _ in range(24):
            writer.append({"a": rows})  # 96 MiB
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_STREAM, tmp_path / "s"], capture_output=True, text=True, check=True
    )
    peak = int(done.stdout)
    assert peak > 16 * megabyte, "the test must see the windows"
    assert peak < 32 * megabyte + 36 * megabyte, "two windows, and what the allocator keeps of batches and chunks"


def test_a_batch_that_is_kept_keeps_its_rows(numbered):
    """Memory that a batch refers to is not used for another window."""
    with ShuffledBatches(numbered(), ["a"], batch_size=3, window_bytes=4 * CHUNK_BYTES) as batches:
        kept = [next(batches)["a"] for _ in range(72 * 3 // 3)]
        seen = [[int(row) for row in batch[:, 0]] for batch in kept]
    with ShuffledBatches(numbered(), ["a"], batch_size=3, window_bytes=4 * CHUNK_BYTES) as batches:
        assert seen == [rows_of(batches, 1) for _ in seen]
