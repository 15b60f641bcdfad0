"""Held-out text, and masks of what packing placed, in whole harvests."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from thresher.harvest import run
from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore
from thresher.shared.core.errors import DataError


@pytest.fixture
def config(model_folder, tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"chapter {i} of dust and grain" for i in range(200)))

    def made(**changes):
        options = dict(
            model=str(model_folder),
            dataset=str(tmp_path / "book.txt"),
            hook_points=["blocks.0.resid_post"],
            store=str(tmp_path / "store"),
            tokens=100_000,
            context_size=8,
            model_dtype="float32",
            device="cpu",
            workers=1,
        )
        return HarvestConfig(**options | changes)

    return made


def test_one_document_is_refused_before_the_model_runs(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_model", lambda *_: pytest.fail("ran the model"))
    with pytest.raises(DataError, match=r'from 1 document .* set holdout = "contexts"'):
        harvest(config())
    assert not (tmp_path / "store").exists()


def test_contexts_of_one_document_are_held_out_with_a_gap(config, tmp_path, capsys):
    store = ActivationStore.open(harvest(config(holdout="contexts")))
    said = "note: holds out contexts, not documents: of every 82 contexts in a row, 4 held out and one on each side"
    assert said in capsys.readouterr().err
    assert store.metadata["holdout"] == "contexts"
    held_out = store.held_out_contexts()
    _, positions = store.documents(0, store.n_rows)
    first = positions.reshape(-1, 8)[:, 1]
    order = np.argsort(first)
    changes = np.flatnonzero(np.diff(held_out[order].astype(int)))
    assert len(changes) > 10
    assert (np.diff(first[order])[changes] == 14).all()  # a context of 7 tokens lies between
    assert 0.04 < held_out.mean() < 0.06
    assert store.verify() == []
    again = ActivationStore.open(harvest(config(holdout="contexts", tokens=4000, store=str(tmp_path / "less"))))
    shared = {tuple(row): held for row, held in zip(positions.reshape(-1, 8).tolist(), held_out, strict=True)}
    _, theirs = again.documents(0, again.n_rows)
    for row, held in zip(theirs.reshape(-1, 8).tolist(), again.held_out_contexts(), strict=True):
        assert shared[tuple(row)] == held


def test_a_document_longer_than_the_harvest_gives_both_splits(config, tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"chapter {i} of dust and grain" for i in range(4000)))
    for tokens in (400, 8 * 656):  # within a cycle of 82 contexts; about 8 of them
        store = ActivationStore.open(
            harvest(config(holdout="contexts", tokens=tokens, holdout_fraction=0.1, store=str(tmp_path / f"{tokens}")))
        )
        assert store.n_rows == tokens
        assert 0.08 < store.held_out_contexts().mean() < 0.18


@pytest.mark.parametrize("bos_every_context", [True, False])
def test_a_bos_that_is_an_ordinary_token_is_masked_only_where_it_was_placed(config, bos_every_context):
    store = ActivationStore.open(
        harvest(config(bos_token="t", holdout_fraction=0.0, bos_every_context=bos_every_context))
    )
    tokenizer = AutoTokenizer.from_pretrained(config().model)
    tokens = store.tokens(0, store.n_rows).numpy()
    _, positions = store.documents(0, store.n_rows)
    assert np.array_equal(store.row_mask(0, store.n_rows), positions > 0)
    in_text = (tokens == tokenizer.convert_tokens_to_ids("t")) & (positions > 0)
    assert in_text.sum() > 100
    assert store.training_rows_per_chunk().sum() == (positions > 0).sum()
    assert store.moments("blocks.0.resid_post").count == (positions > 0).sum()
    assert store.metadata["mask_token_ids"] == [0]


def test_a_bos_that_is_special_needs_no_roles(config):
    store = ActivationStore.open(harvest(config(holdout_fraction=0.0)))
    _, positions = store.documents(0, store.n_rows)
    assert not store.has_roles
    assert np.array_equal(store.row_mask(0, store.n_rows), positions > 0)


def test_special_tokens_that_the_text_spells_out_are_noted(config, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("<bos>dust " * 100)
    plain = ActivationStore.open(harvest(config(holdout_fraction=0.0)))
    assert "1 of the first 1 documents spell out the special token '<bos>'" in capsys.readouterr().err
    kept = ActivationStore.open(
        harvest(config(holdout_fraction=0.0, special_tokens="tokens", store=str(tmp_path / "kept")))
    )
    assert "spell out" not in capsys.readouterr().err
    counts = []
    for store in (plain, kept):
        tokens, (_, positions) = store.tokens(0, store.n_rows).numpy(), store.documents(0, store.n_rows)
        assert np.array_equal(store.row_mask(0, store.n_rows), positions > 0)
        counts.append(int(((tokens == 0) & (positions > 0)).sum()))
    assert counts[0] == 0
    assert counts[1] > 50
