"""Packing: nothing lost or repeated, splits never mixed, groups whole, resume the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.harvest.tokens.holdout import context_split, is_held_out
from thresher.harvest.tokens.packing import TokenizedDocument, pack, stack
from thresher.harvest.tokens.tokens import batch_contexts
from thresher.shared.core.errors import DataError
from thresher.shared.store.format.roles import PLACED

BOS = 99


def documents_of(lengths, hashes=None):
    """Documents whose tokens encode their position: document i contains 1000 * i + 1, 1000 * i + 2, ..."""
    hashes = hashes or [(i * 0x9E3779B97F4A7C15) % 2**64 for i in range(len(lengths))]
    return [
        TokenizedDocument(i, f"doc{i}", hashes[i], 1000 * i + 1 + np.arange(n, dtype=np.int32))
        for i, n in enumerate(lengths)
    ]


def expected_stream(documents, context_size, held_out, fraction, bos_every_context):
    """The same packing, one token at a time."""
    rows = []
    for document in documents:
        if is_held_out(document.hash, fraction) != held_out:
            continue
        rows.append((BOS, document.number, 0))
        for position, token in enumerate(document.tokens, 1):
            if bos_every_context and len(rows) % context_size == 0:
                rows.append((BOS, document.number, 0))
            rows.append((int(token), document.number, position))
    return rows[: len(rows) // context_size * context_size]


def pack_all(documents, **options):
    options = dict(context_size=8, bos=BOS, holdout_fraction=0.3, n_contexts=10**6, group=1) | options
    return list(pack(iter(documents), **options))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=12, max_size=40),
    context_size=st.integers(2, 17),
    group=st.integers(1, 4),
    bos_every_context=st.booleans(),
    fraction=st.sampled_from([0.0, 0.3]),
)
def test_every_token_once_and_in_order(lengths, context_size, group, bos_every_context, fraction):
    documents = documents_of([*lengths, 60, 60, 60])
    contexts = pack_all(
        documents,
        context_size=context_size,
        group=group,
        holdout_fraction=fraction,
        bos_every_context=bos_every_context,
    )
    for held_out in (False, True):
        ours = [context for context in contexts if context.held_out == held_out]
        rows = [
            row for c in ours for row in zip(c.tokens.tolist(), c.documents.tolist(), c.positions.tolist(), strict=True)
        ]
        assert rows == expected_stream(documents, context_size, held_out, fraction, bos_every_context)
    for context in contexts:
        assert set(context.info) == set(context.documents.tolist())
        assert all(is_held_out(hash_, fraction) == context.held_out for hash_, _ in context.info.values())


def test_groups_are_of_one_split_until_the_last():
    contexts = pack_all(documents_of([30] * 60), group=4, n_contexts=200)
    kinds = [context.held_out for context in contexts]
    whole = kinds[: len(kinds) // 4 * 4 - 8]
    assert all(len(set(whole[i : i + 4])) == 1 for i in range(0, len(whole), 4))
    assert True in kinds
    assert False in kinds


@pytest.mark.parametrize("n_contexts", [7, 8, 31, 64])
@pytest.mark.parametrize("group", [1, 4, 50])
def test_the_number_of_contexts_is_exact(n_contexts, group):
    contexts = pack_all(documents_of([30] * 200), group=group, n_contexts=n_contexts)
    assert len(contexts) == n_contexts
    assert {context.held_out for context in contexts} == {False, True}


def test_packing_does_not_read_on_when_it_has_enough():
    read = []

    def documents():
        for document in documents_of([30] * 500):
            read.append(document.number)
            yield document

    assert len(pack_all(documents(), n_contexts=20, group=4)) == 20
    assert len(read) < 20


def test_a_batch_holds_the_provenance_of_its_contexts():
    contexts = pack_all(documents_of([5, 30, 3, 9, 40] * 4))
    batch = stack(contexts[2:5])
    assert batch.tokens.shape == batch.documents.shape == batch.positions.shape == (3, 8)
    assert batch.held_out.tolist() == [context.held_out for context in contexts[2:5]]
    assert set(batch.info) == set(batch.documents.flatten().tolist())
    assert (batch.tokens.dtype, batch.documents.dtype, batch.positions.dtype) == (np.int32, np.int64, np.int32)


def test_batches_resume_anywhere():
    contexts = pack_all(documents_of([30] * 40))
    whole = list(batch_contexts(iter(contexts), 3))
    assert sum(len(batch.tokens) for batch in whole) == len(contexts)
    for first in range(len(whole) + 1):
        resumed = list(batch_contexts(iter(contexts), 3, first))
        assert len(resumed) == len(whole) - first
        for ours, theirs in zip(resumed, whole[first:], strict=True):
            assert np.array_equal(ours.tokens, theirs.tokens)


def test_missing_splits_are_named():
    with pytest.raises(DataError, match="no held-out context of 8 tokens"):
        pack_all(documents_of([30] * 3, hashes=[2**64 - 1] * 3))
    with pytest.raises(DataError, match="no training context of 8 tokens"):
        pack_all(documents_of([30] * 3, hashes=[0] * 3))
    with pytest.raises(DataError, match="no training context"):
        pack_all(documents_of([3]), holdout_fraction=0)
    assert len(pack_all(documents_of([30] * 3), holdout_fraction=0)) == 13


@pytest.mark.parametrize("holdout", ["documents", "contexts"])
def test_roles_say_which_rows_were_placed(holdout):
    """A BOS that packing places and the same token in the text differ in their role alone."""
    documents = documents_of([30] * 9)
    for document in documents:
        document.tokens[::3] = BOS
    documents = [document._replace(roles=(document.tokens % 5 + 1).astype(np.int8)) for document in documents[:5]] + [
        document for document in documents[5:]
    ]
    for context in pack_all(documents, holdout=holdout, n_contexts=10**6):
        assert np.array_equal(context.roles == PLACED, context.positions == 0)
        for token, number, position, role in zip(
            context.tokens, context.documents, context.positions, context.roles, strict=True
        ):
            assert position == 0 or role == (token % 5 + 1 if number < 5 else 1)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=4),
    context_size=st.integers(2, 9),
    group=st.integers(1, 6),
    fraction=st.sampled_from([0.05, 0.1, 0.3, 0.8]),
)
def test_held_out_contexts_keep_their_distance(lengths, context_size, group, fraction):
    documents = documents_of([*lengths, 2000])
    options = dict(context_size=context_size, group=group, holdout_fraction=fraction, bos_every_context=False)
    contexts = pack_all(documents, holdout="contexts", **options)
    stream = expected_stream(documents, context_size, False, 0.0, False)
    place = {row: number // context_size for number, row in enumerate(stream)}
    splits = {}
    for context in contexts:
        first = (int(context.tokens[0]), int(context.documents[0]), int(context.positions[0]))
        assert splits.setdefault(place[first], context.held_out) is context.held_out
    assert len(splits) == len(contexts)
    numbers = np.array(sorted(splits))
    held_out = np.array([splits[number] for number in numbers])
    other = np.flatnonzero(held_out[1:] != held_out[:-1])
    assert len(other)
    assert (numbers[other + 1] - numbers[other] >= 2).all()
    # Only the contexts between the splits are left out, and the fraction is about the one asked for.
    assert len(stream) // context_size - len(splits) <= len(other) + 2
    if len(splits) > 200:
        assert abs(held_out.mean() - fraction) < 0.4 * fraction + 0.02


def test_the_split_of_a_context_depends_on_its_number_alone():
    """Reading more text gives the same contexts first: held-out contexts stay held out."""
    for fraction in (0.01, 0.05, 0.5, 0.95):
        splits = [context_split(number, fraction) for number in range(4000)]
        held_out = [split for split in splits if split is not None]
        assert abs(np.mean(held_out) - fraction) < 0.02
        assert splits.count(None) <= 4000 * 0.03
        assert splits[0] is False
    assert {context_split(number, 0) for number in range(100)} == {False}


def test_an_error_about_few_documents_names_the_other_holdout():
    with pytest.raises(DataError, match=r'from 3 documents .* set holdout = "contexts"'):
        pack_all(documents_of([30] * 3, hashes=[2**64 - 1] * 3))
    with pytest.raises(DataError, match=r"^(?!.*set holdout)"):
        pack_all(documents_of([20]), holdout="contexts", holdout_fraction=0.05)
