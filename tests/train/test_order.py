"""The order of training rows is a pure function that visits each row exactly once per epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.train.order import order_epoch, order_window

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
