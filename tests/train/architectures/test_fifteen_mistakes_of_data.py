"""The mistakes of `test_fifteen_mistakes.py` that public SAE code has made in reading data: 8 to 12.

Tests named `..._is_noticed` make the mistake and expect the check to fail.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import thresher.train.stream.batches as batches_module
from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import ConfigError
from thresher.shared.store import Moments
from thresher.train import ShuffledBatches
from thresher.train.stream import normalization as normalization_module
from thresher.train.stream.normalization import normalization_of, row_scale

D_IN = 6


def check_moments_are_of_all_rows(tmp_path):
    """Batches whose means agree but rows vary, then rows of a hundred times the norm in the last batch."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 8, D_IN, generator=generator) * (1 + 100 * (i == 11)) for i in range(12)]
    parts = [part - part.mean((0, 1)) + torch.linspace(0, 40, D_IN) for part in parts]
    with ActivationStoreWriter(tmp_path / "store", {"h": D_IN}, 8, dtype="float32") as writer:
        for part in parts:
            writer.append({"h": part})
    store = ActivationStore.open(tmp_path / "store")
    x = np.concatenate([part.double().numpy().reshape(-1, D_IN) for part in parts])
    scale = D_IN**0.5 / np.linalg.norm(x - x.mean(0), axis=1).mean()
    normalization = normalization_of(store, "h", row_scale(store, "h", "expected_average_only_in", 0.0))
    assert normalization.scale == pytest.approx(scale, rel=1e-6)
    assert normalization.total_variance == pytest.approx(x.var(0).sum() * scale**2, rel=1e-6)


def test_8_moments_are_of_all_rows(tmp_path):
    check_moments_are_of_all_rows(tmp_path)


def test_8_a_variance_without_its_part_within_batches_is_noticed(tmp_path, monkeypatch):
    of = Moments.of

    def of_the_mean_alone(cls, blocks, d_in):
        moments = of(blocks, d_in)
        return replace(moments, M2=np.zeros_like(moments.M2))

    monkeypatch.setattr(Moments, "of", classmethod(of_the_mean_alone))
    with pytest.raises(AssertionError):
        check_moments_are_of_all_rows(tmp_path)


@pytest.mark.parametrize("mistake", ["of the first batches", "of rows that are not centred"])
def test_8_another_mean_norm_is_noticed(tmp_path, monkeypatch, mistake):
    def norms(store, hook):
        if mistake == "of the first batches":
            return (store.read(hook, 0, 8 * 16) - torch.as_tensor(store.moments(hook).mean)).norm(dim=1).numpy()
        return np.array([store.moments(hook).mean_norm])

    monkeypatch.setattr(normalization_module, "centred_norms", norms)
    with pytest.raises(AssertionError):
        check_moments_are_of_all_rows(tmp_path)


def stream(array_store, epochs=2, **options):
    """Return a numbered store's rows as a stream gives them, epoch by epoch."""
    rows = torch.arange(96, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()
    store = array_store({"h": rows})
    with ShuffledBatches(store, ["h"], 16, window_bytes=2 * 12 * 4 * 2 * 4, **options) as batches:
        return [[int(row) for _ in range(6) for row in next(batches)["h"][:, 0]] for _ in range(epochs)]


def check_shuffle(array_store):
    first, second = stream(array_store)
    assert sorted(first) == sorted(second) == list(range(96))
    assert first != sorted(first)
    assert first != second
    ranks = [np.argsort(np.argsort(part)).tolist() for part in (first[:48], first[48:], second[:48], second[48:])]
    assert len({tuple(rank) for rank in ranks}) == 4, "the same permutation in two windows or epochs"


def test_9_every_epoch_and_window_has_its_own_order(array_store):
    check_shuffle(array_store)


@pytest.mark.parametrize("mistake", ["never read", "the same in every window"])
def test_9_an_order_that_does_not_change_is_noticed(array_store, monkeypatch, mistake):
    order_epoch, place_window = batches_module.order_epoch, batches_module.place_window

    def unshuffled_chunks(rows, per_window, seed, epoch):
        order = order_epoch(rows, per_window, seed, 0)
        return order._replace(chunks=np.arange(len(order.chunks)))

    def one_order(rows, seed, epoch, window, run):
        return np.arange(rows.sum()) if mistake == "never read" else place_window(rows, seed, 0, 0)

    monkeypatch.setattr(batches_module, "order_epoch", unshuffled_chunks)
    monkeypatch.setattr(batches_module, "place_window", one_order)
    with pytest.raises(AssertionError):
        check_shuffle(array_store)


def check_the_stream_goes_on_where_it_was(array_store):
    rows = torch.arange(96, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()
    with (
        ShuffledBatches(array_store({"h": rows}), ["h"], 7) as batches,
        ShuffledBatches(batches.store, ["h"], 7) as other,
    ):
        for _ in range(9):
            next(batches)
        other.load_state_dict(batches.state_dict())
        assert torch.equal(next(batches)["h"], next(other)["h"])


def test_10_the_stream_resumes_where_it_was(array_store):
    check_the_stream_goes_on_where_it_was(array_store)


def test_10_a_stream_that_starts_over_is_noticed(array_store, monkeypatch):
    monkeypatch.setattr(ShuffledBatches, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        check_the_stream_goes_on_where_it_was(array_store)


def check_no_row_is_dropped_or_repeated_at_an_end(array_store, batch_size):
    """96 rows are no multiple of the batch, nor of the shards; after two epochs each was given twice."""
    rows = torch.arange(96, dtype=torch.float32)[:, None]
    with ShuffledBatches(array_store({"h": rows}, chunk_rows=7), ["h"], batch_size) as batches:
        seen = torch.cat([next(batches)["h"][:, 0] for _ in range(-(-192 // batch_size))])[:192]
    assert torch.bincount(seen[:96].long()).tolist() == [1] * 96
    assert torch.bincount(seen.long()).tolist() == [2] * 96


@pytest.mark.parametrize("batch_size", [1, 7, 50, 95, 200])
def test_11_no_row_is_dropped_or_repeated_at_an_end(array_store, batch_size):
    check_no_row_is_dropped_or_repeated_at_an_end(array_store, batch_size)


@pytest.mark.parametrize("batch_size", [7, 50])
@pytest.mark.parametrize("mistake", ["dropped", "repeated"])
def test_11_an_end_that_is_dropped_or_repeated_is_noticed(array_store, monkeypatch, mistake, batch_size):
    def mistaken(position, rows_per_epoch):
        if mistake == "dropped":
            return divmod(position, rows_per_epoch - rows_per_epoch % batch_size)
        return 0, position % rows_per_epoch if position < rows_per_epoch else 0

    monkeypatch.setattr(batches_module, "epoch_and_row", mistaken)
    with pytest.raises(AssertionError):
        check_no_row_is_dropped_or_repeated_at_an_end(array_store, batch_size)


def check_ranks_share_the_rows(array_store, make):
    """A context held out and some rows masked, over 3 ranks."""
    masked = np.arange(112) % 37 == 0
    store = array_store({"h": torch.arange(112.0)[:, None]}, held_out=np.arange(14) == 5, masked=masked)
    usable = np.flatnonzero(store.training_mask())
    ranks = [make(store, rank) for rank in range(3)]
    seen = torch.cat([next(rank)["h"][:, 0] for _ in range(-(-len(usable) // 9)) for rank in ranks])[: len(usable)]
    for rank in ranks:
        rank.close()
    assert sorted(seen.int().tolist()) == usable.tolist()


def test_12_ranks_share_the_rows_without_overlap_or_rest(array_store):
    """An uneven batch is refused, not cut."""
    check_ranks_share_the_rows(
        array_store, lambda store, rank: ShuffledBatches(store, ["h"], 9, rank=rank, world_size=3)
    )
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        ShuffledBatches(array_store({"h": torch.arange(16.0)[:, None]}), ["h"], 10, world_size=3)


@pytest.mark.parametrize("mistake", ["the same rows", "an uneven batch cut"])
def test_12_ranks_that_overlap_or_cut_are_noticed(array_store, mistake):
    def make(store, rank):
        if mistake == "the same rows":
            return ShuffledBatches(store, ["h"], 9, rank=0, world_size=3)
        batches = ShuffledBatches(store, ["h"], 9, rank=rank, world_size=3)
        batches.batch_size = 10
        return batches

    with pytest.raises(AssertionError):
        check_ranks_share_the_rows(array_store, make)
