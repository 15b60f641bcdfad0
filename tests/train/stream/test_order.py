"""The order of training rows is a pure function that visits each row exactly once per epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.train.stream import order as order_module
from thresher.train.stream.order import order_epoch, place_window


def order_window(*key):
    """Return a window's rows in their order: the inverse of their places, by a sort."""
    return np.argsort(place_window(*key))


counts = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any)


@given(counts, st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None)
def test_windows_partition_the_chunks(rows, per_window, seed, epoch):
    rows = np.array(rows)
    order = order_epoch(rows, per_window, seed, epoch)
    windows = [order.window(i) for i in range(order.n_windows)]
    assert sorted(np.concatenate(windows)) == list(np.flatnonzero(rows))
    sizes = [len(window) for window in windows]
    assert max(sizes) <= per_window
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(np.diff(order.row_starts), [rows[window].sum() for window in windows])


@given(counts, st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None)
def test_window_order_is_a_permutation_that_spreads_every_chunk(rows, seed, window):
    rows = np.array([n for n in rows if n])
    order = order_window(rows, seed, 0, window)
    assert sorted(order) == list(range(rows.sum()))
    chunk_of_row = np.repeat(np.arange(len(rows)), rows)
    half = chunk_of_row[order][: len(order) // 2]
    for chunk, n in enumerate(rows):
        # Half the strata of a chunk come before the middle, give or take the one it cuts and rounding.
        assert abs((half == chunk).sum() - n / 2) <= 2 + n / 4


def test_seed_epoch_and_window_each_change_the_order():
    rows = np.full(50, 8)
    orders = [order_epoch(rows, 10, seed, epoch).chunks.tolist() for seed in (0, 1) for epoch in (0, 1)]
    windows = [order_window(rows, *key).tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(window) for window in windows}) == 4


@pytest.mark.parametrize("place", [0, 100, 399])
def test_every_row_may_come_at_every_place(place):
    rows = np.full(50, 8)
    chunks = {order_window(rows, seed, 0, 0)[place] for seed in range(60)}
    assert len(chunks) > 40
    assert max(chunks) - min(chunks) > 200


def chunks_of_many_sizes(largest):
    generator = np.random.default_rng(largest)
    return np.concatenate([np.full(30, largest), generator.integers(1, largest + 1, 70)])


@pytest.mark.parametrize("largest", [1, 2, 40, 500, 5000])
def test_any_stretch_holds_about_as_many_rows_of_a_chunk_as_its_share(largest):
    """Up to the rounding of both ends: chunks of as many rows as there are strata have one in each."""
    rows = chunks_of_many_sizes(largest)
    chunk_of_row = np.repeat(np.arange(len(rows)), rows)[order_window(rows, 0, 0, 0)]
    n = len(chunk_of_row)
    for start, stop in ((0, n // 3), (n // 7, n // 2), (n // 2, n)):
        found = np.bincount(chunk_of_row[start:stop], minlength=len(rows))
        expected = rows * (stop - start) / n
        assert np.abs(found - expected)[rows == largest].max() <= 2
        assert np.abs(found - expected).max() <= 2 + np.log2(largest)


@pytest.mark.parametrize(("most", "fewer"), [(510, 255), (512, 256), (500, 100), (64, 48)])
def test_chunks_of_fewer_rows_are_spread_evenly_too(most, fewer):
    rows = np.array([most] * 40 + [fewer] * 10)
    places = place_window(rows, 0, 0, 0)[-10 * fewer :].reshape(10, fewer)
    gaps = np.diff(np.sort(places * most // rows.sum()))
    assert gaps.max() <= 2 * most / fewer + 1


def test_a_stratum_holds_no_two_rows_of_a_chunk():
    rows = np.full(60, 32)
    strata = (order_window(rows, 0, 0, 0) // 32).reshape(32, 60)
    assert all(len(set(stratum)) == 60 for stratum in strata.tolist())


@pytest.mark.parametrize("rows", [np.full(40, 16), chunks_of_many_sizes(16)])
def test_rows_and_places_meet_as_often_as_chance_has_it(rows):
    """Each row of each chunk is in each tenth of the window equally often, over many windows."""
    n_windows, n_rows = 600, int(rows.sum())
    places = np.stack([place_window(rows, 0, 0, window) for window in range(n_windows)])
    tenths = np.stack([np.bincount(column, minlength=10) for column in (places * 10 // n_rows).T])
    chi_squares = ((tenths - n_windows / 10) ** 2).sum(1) / (n_windows / 10)
    assert abs(chi_squares.mean() - 9) < 0.7, "9 degrees of freedom"
    assert chi_squares.max() < 9 + 8 * 18**0.5
    order_of_two = places[:, 0] < places[:, 1]
    assert abs(order_of_two.mean() - 0.5) < 0.08, "two rows of one chunk come in either order"


def test_rows_far_apart_in_a_chunk_are_no_more_apart_in_the_order_than_neighbours():
    rows = np.full(20, 256)
    places = np.stack([place_window(rows, 1, 0, window).reshape(20, 256) for window in range(40)]) / rows.sum()
    neighbours, others = (np.abs(places[:, :, k:] - places[:, :, :-k]).mean() for k in (1, 100))
    assert abs(neighbours - 1 / 3) < 0.005
    assert abs(others - 1 / 3) < 0.005


@pytest.mark.parametrize("largest", [1, 7, 300, 5000])
def test_places_are_the_orders_inverse_whatever_the_blocks_are_run_by(largest, monkeypatch):
    rows = chunks_of_many_sizes(largest)
    monkeypatch.setattr(order_module, "_BLOCK_ROWS", 3 * largest)
    order = order_window(rows, 3, 2, 1)
    places = place_window(rows, 3, 2, 1, lambda work, blocks: [work(block) for block in reversed(blocks)])
    np.testing.assert_array_equal(places[order], np.arange(rows.sum()))


def test_the_order_is_the_one_that_runs_began_in():
    """Whoever changes it counts `ORDER_VERSION` up, and writes here what it is then."""
    assert order_module.ORDER_VERSION == 2
    long = order_window(np.array([4100, 4097]), 0, 0, 0)
    assert long[:6].tolist() == [7895, 2237, 3357, 4674, 6764, 2673]
    in_blocks = order_window(np.full(4, 10_000), 0, 0, 0)
    assert in_blocks[:5].tolist() == [32702, 3746, 17900, 27388, 34465]
    assert order_window(np.array([3, 5, 4]), 1, 2, 3).tolist() == [7, 11, 1, 2, 6, 9, 4, 0, 3, 10, 8, 5]
    assert order_epoch(np.array([3, 0, 5, 4]), 2, 1, 2).chunks.tolist() == [0, 2, 3]
