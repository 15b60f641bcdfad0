"""Which rows are evaluated: against the arrays that were written to the store."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.evaluate.metrics.held_out import context_spans, evenly_spaced, held_out
from thresher.shared.store import ActivationStore

HOOKS = ("blocks.0.resid_post", "blocks.1.resid_post")


@given(st.sets(st.integers(0, 60), min_size=1))
def test_spans_cover_the_contexts_once_and_are_maximal(contexts):
    spans = context_spans(np.array(sorted(contexts)))
    assert [c for start, stop in spans for c in range(start, stop)] == sorted(contexts)
    assert all(a[1] < b[0] for a, b in pairwise(spans))


@given(st.integers(1, 500), st.integers(1, 5000), st.integers(1, 64))
def test_evenly_spaced_is_even_and_within_its_limit(n_contexts, max_rows, context_size):
    chosen = evenly_spaced(n_contexts, max_rows, context_size)
    assert 1 <= len(chosen) <= max(1, max_rows // context_size)
    assert chosen[0] == 0
    assert chosen[-1] < n_contexts
    gaps = np.diff(np.append(chosen, n_contexts))
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("block_rows", [1, 30, 10_000])
def test_blocks_hold_every_usable_held_out_row_once_in_order(tiny, block_rows):
    rows = held_out(ActivationStore.open(tiny.store))
    blocks = list(rows.blocks(HOOKS, block_rows))
    for hook in HOOKS:
        joined = torch.cat([block.activations[hook] for block in blocks])
        torch.testing.assert_close(joined, tiny.activations[hook][torch.from_numpy(tiny.usable)], rtol=0, atol=0)
    assert sum(block.n_contexts for block in blocks) == tiny.held_out.sum()
    group = torch.cat([block.group for block in blocks]).numpy()
    _, expected = np.unique(tiny.documents[tiny.usable], return_inverse=True)
    np.testing.assert_array_equal(group, expected)
    assert rows.n_documents == rows.n_groups == 5
    assert rows.n_rows == tiny.usable.sum()


@pytest.mark.parametrize("mistake", ["all contexts", "those that were trained on"])
def test_evaluation_on_trained_tokens_is_noticed(tiny, monkeypatch, mistake):
    """The fifteenth of the mistakes that `tests/train/architectures/test_fifteen_mistakes.py` lists."""
    marked = ActivationStore.held_out_contexts

    def mistaken(store):
        return np.ones_like(marked(store)) if mistake == "all contexts" else ~marked(store)

    monkeypatch.setattr(ActivationStore, "held_out_contexts", mistaken)
    with pytest.raises(AssertionError):
        test_blocks_hold_every_usable_held_out_row_once_in_order(tiny, 30)


def test_token_batches(tiny):
    rows = held_out(ActivationStore.open(tiny.store))
    batches = list(rows.token_batches(5))
    np.testing.assert_array_equal(torch.cat([tokens for tokens, _ in batches]), tiny.tokens[tiny.held_out])
    np.testing.assert_array_equal(
        np.concatenate([rows.usable[part] for _, part in batches]), tiny.usable[tiny.held_out]
    )
    few = rows.subset(24)
    assert len(few.contexts) == 2
    assert few.n_groups == rows.n_groups
