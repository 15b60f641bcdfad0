"""Which contexts are kept, however many of a block's are offered at once."""

from __future__ import annotations

import numpy as np

from thresher.evaluate.features.contexts import BestContexts
from thresher.evaluate.features.sparse import ActiveLatents


def test_many_short_contexts_cost_no_more_than_are_kept(monkeypatch):
    n_contexts, size, d_sae, n = 500, 4, 6, 3
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((n_contexts * size, d_sae)) < 0.5, rng.integers(1, 40, (n_contexts * size, d_sae)), 0)
    row, latent = np.nonzero(dense)
    block = ActiveLatents(0, size, d_sae, row, latent, dense[row, latent].astype(np.float32))
    widths, full = [], np.full
    monkeypatch.setattr(np, "full", lambda shape, *more, **named: widths.append(shape) or full(shape, *more, **named))
    best = BestContexts(d_sae, n, size)
    widths.clear()
    peaks = block.context_peaks()
    best.add(block, *peaks, peaks[2].astype(np.float64))
    assert max(shape[1] for shape in widths) == 2 * n
    by_context = dense.reshape(n_contexts, size, d_sae).max(axis=1)
    for number in range(d_sae):
        expected = np.argsort(-by_context[:, number], kind="stable")[:n]  # of equal ones the earlier
        assert (best.row[number] // size).tolist() == expected.tolist()
        assert best.value[number].tolist() == by_context[expected, number].tolist()


def test_peaks_of_many_latents_in_contexts_of_one_row():
    d_sae, n_rows = 1 << 20, 4096
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, d_sae * n_rows, 500))
    keys = np.append(keys, d_sae * n_rows - 1)
    row, latent = np.divmod(keys, d_sae)
    value = rng.random(len(keys), dtype=np.float32) + 1
    found = ActiveLatents(0, 1, d_sae, row, latent, value).context_peaks()
    order = np.lexsort((row, latent))  # each entry is its context's only one
    for column, expected in zip(found, (latent, row, value), strict=True):
        np.testing.assert_array_equal(column, expected[order])
