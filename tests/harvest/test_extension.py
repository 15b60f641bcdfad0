"""A store extended to more rows has the bytes of one harvested at once, whenever it was killed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from thresher.harvest import resume as resume_module
from thresher.harvest import steps as steps_module
from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import StoreBusyError, StoreError
from thresher.shared.store.format.manifest import read_manifest
from thresher.shared.store.local import durable
from thresher.shared.store.local import store_folder as commit

CONTEXT, GROUP, PER_SHARD, BATCH = 8, 4, 8, 5
SIZES = (30, 59)
HOOKS = ["blocks.1.resid_post", "blocks.0.mlp_out"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(durable, "flush", lambda handle: None)
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def config(model_folder, text_folder, tmp_path):
    return HarvestConfig(
        model=str(model_folder),
        dataset=str(text_folder),
        hook_points=HOOKS,
        store=str(tmp_path / "store"),
        tokens=SIZES[0] * CONTEXT,
        context_size=CONTEXT,
        batch_size=BATCH,
        holdout_fraction=0.35,
        dtype="float32",
        chunk_bytes=GROUP * CONTEXT * 16 * 4,
        shard_bytes=PER_SHARD * CONTEXT * 16 * 4,
        model_dtype="float32",
        workers=1,
    )


def replaced(config, **changes):
    return msgspec.structs.replace(config, **changes)


def files_of(folder):
    """Return every file but the written configuration, which names the store."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    del files["harvest.toml"]
    return files


def at_once(config, n_contexts):
    """Return the files of a store of so many contexts that is harvested from nothing."""
    store = f"{config.store}-{n_contexts}-at-once"
    return files_of(harvest(replaced(config, store=store, tokens=n_contexts * CONTEXT)))


@pytest.fixture
def count_contexts(monkeypatch):
    """The function that returns how many contexts went through the model since the last call."""
    seen = []
    append = steps_module.append
    monkeypatch.setattr(
        steps_module, "append", lambda *args: seen.append(args[3].stop - args[3].start) or append(*args)
    )

    def count():
        n = sum(seen)
        seen.clear()
        return n

    return count


@pytest.mark.parametrize("before", [1, 7, 8, 16, 24, 30, 32, 33, 45, 58])
def test_an_extended_store_has_the_bytes_of_one_harvested_at_once(config, before, count_contexts, capsys):
    harvest(replaced(config, tokens=before * CONTEXT, holdout_fraction=0.0))
    config = replaced(config, holdout_fraction=0.0, tokens=SIZES[1] * CONTEXT)
    count_contexts(), capsys.readouterr()
    harvest(config)
    assert f"note: the store holds {before * CONTEXT} rows and is extended to {SIZES[1] * CONTEXT}\n" in (
        capsys.readouterr().err
    )
    n_made = count_contexts()
    assert files_of(config.store) == at_once(config, SIZES[1])
    assert n_made <= SIZES[1] - (before - 2 * GROUP) // PER_SHARD * PER_SHARD
    assert ActivationStore.open(config.store).verify() == []


@pytest.mark.parametrize("before", [20, 24, 30, 33, 45, 58])
def test_the_last_groups_of_both_splits_are_made_again(config, before):
    """Packing ends with what is left of either split, so the last contexts stored come elsewhere in a larger store."""
    harvest(replaced(config, tokens=before * CONTEXT))
    kept = ActivationStore.open(config.store).read(HOOKS[0], 0, before * CONTEXT)
    harvest(replaced(config, tokens=SIZES[1] * CONTEXT))
    assert files_of(config.store) == at_once(config, SIZES[1])
    n_kept = (before - 2 * GROUP) * CONTEXT
    assert torch.equal(ActivationStore.open(config.store).read(HOOKS[0], 0, n_kept), kept[:n_kept])


@pytest.mark.parametrize("changes", [{"holdout": "contexts"}, {"special_tokens": "tokens"}, {"codec": "int8"}])
def test_other_ways_to_hold_out_and_to_store_are_extended_alike(config, changes):
    config = replaced(config, **changes)
    harvest(config)
    larger = replaced(config, tokens=SIZES[1] * CONTEXT)
    harvest(larger)
    assert files_of(config.store) == at_once(larger, SIZES[1])


def test_a_store_can_be_extended_again_and_again(config):
    for n_contexts in (9, 17, 30, 31, 59):
        harvest(replaced(config, tokens=n_contexts * CONTEXT))
        assert ActivationStore.open(config.store).n_contexts == n_contexts
    assert files_of(config.store) == at_once(config, 59)


def interrupt(config, monkeypatch, after):
    with monkeypatch.context() as patch:
        append, calls = steps_module.append, []

        def failing(*arguments):
            if len(calls) == after:
                raise RuntimeError("interrupted")
            calls.append(append(*arguments))

        patch.setattr(steps_module, "append", failing)
        with pytest.raises(RuntimeError, match="interrupted"):
            harvest(config)


@pytest.mark.parametrize("after", [0, 2, 4, 5])
def test_an_interrupted_harvest_is_extended_and_taken_back(config, monkeypatch, after):
    expected = {n_contexts: at_once(config, n_contexts) for n_contexts in SIZES}
    interrupt(config, monkeypatch, after)
    harvest(replaced(config, tokens=SIZES[1] * CONTEXT))
    assert files_of(config.store) == expected[SIZES[1]]

    other = replaced(config, store=config.store + "-other")
    interrupt(replaced(other, tokens=SIZES[1] * CONTEXT), monkeypatch, after)
    harvest(other)  # fewer rows than at first, but no fewer than it holds
    assert files_of(other.store) == expected[SIZES[0]]


def test_an_interrupted_extension_is_resumed_or_taken_back(config, monkeypatch):
    expected = {n_contexts: at_once(config, n_contexts) for n_contexts in SIZES}
    larger = replaced(config, tokens=SIZES[1] * CONTEXT)
    harvest(config)
    interrupt(larger, monkeypatch, after=1)
    assert not ActivationStore.open(config.store).complete
    harvest(config)
    assert files_of(config.store) == expected[SIZES[0]]
    interrupt(larger, monkeypatch, after=1)
    harvest(larger)
    assert files_of(config.store) == expected[SIZES[1]]


def test_a_store_is_what_it_was_until_the_first_rows_of_the_extension(config, monkeypatch):
    harvest(config)
    before = files_of(config.store)
    interrupt(replaced(config, tokens=SIZES[1] * CONTEXT), monkeypatch, after=0)
    assert files_of(config.store) == before
    assert ActivationStore.open(config.store).complete
    harvest(config)


def test_fewer_rows_than_are_stored_reuse_a_complete_store(config, capsys):
    harvest(config)
    before = files_of(config.store)
    capsys.readouterr()
    harvest(replaced(config, tokens=100))
    note, reuse = capsys.readouterr().err.splitlines()
    assert note == "note: the store holds 240 rows, more than the 100 requested"
    assert reuse.startswith("reuses store")
    assert files_of(config.store) == before
    harvest(replaced(config, tokens=239))  # as many contexts
    assert capsys.readouterr().err.startswith("reuses store")


def test_fewer_rows_than_are_stored_are_refused_for_an_unfinished_store(config, monkeypatch):
    interrupt(config, monkeypatch, after=4)
    assert read_manifest(Path(config.store)).n_contexts == 16
    with pytest.raises(StoreError, match=r"already holds 128 rows, more than the 100 requested; .*\(tokens = 240 fin"):
        harvest(replaced(config, tokens=100))


def test_a_store_with_all_the_text_is_not_extended(config, capsys):
    everything = replaced(config, tokens=10**5)
    n_rows = ActivationStore.open(harvest(everything)).n_rows
    before = files_of(config.store)
    capsys.readouterr()
    harvest(replaced(config, tokens=10**6))
    assert (
        f"note: the store holds {n_rows:,} rows, all that the text yields; 1,000,000 were requested"
        in capsys.readouterr().err
    )
    assert files_of(config.store) == before
    harvest(replaced(config, store=config.store + "-2"))
    harvest(replaced(everything, store=config.store + "-2"))
    assert files_of(config.store + "-2") == before


def test_contexts_that_are_packed_otherwise_are_never_mixed_in(config, monkeypatch):
    """Even if the digests agree, the stored tokens are compared with those packed now."""
    interrupt(config, monkeypatch, after=4)
    before = files_of(config.store)

    def changed(store, config, contexts, group):
        def follow():
            for number, context in enumerate(contexts):
                tokens = context.tokens.copy()
                tokens[3] += number == 3
                yield context._replace(tokens=tokens)

        return original(store, config, follow(), group)

    original = resume_module.resume_contexts
    monkeypatch.setattr(resume_module, "resume_contexts", changed)
    for tokens in (config.tokens, SIZES[1] * CONTEXT):
        with pytest.raises(
            StoreError, match=r"cannot be resumed: its context 3 is not the one packed now \(it was from '"
        ):
            harvest(replaced(config, tokens=tokens))
        assert files_of(config.store) == before


def test_a_busy_store_is_refused_before_the_model_is_loaded(config, monkeypatch):
    harvest(config)
    header = read_manifest(Path(config.store)).header
    writing = commit.StoreFolder.open(Path(config.store), header, resume=True, any_level=False)
    monkeypatch.setattr("thresher.harvest.model.plan.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    try:
        with pytest.raises(StoreBusyError, match="another process is writing to the store"):
            harvest(replaced(config, tokens=SIZES[1] * CONTEXT))
    finally:
        writing.close()


def test_a_store_with_staged_shards_is_finished_before_it_is_extended(config, monkeypatch):
    interrupt(config, monkeypatch, after=4)
    monkeypatch.setattr(commit, "list_staged", lambda path, header: {5: "of a rank"})
    with pytest.raises(StoreError, match=r"begun with 30 contexts and holds staged shards of several ranks"):
        harvest(replaced(config, tokens=SIZES[1] * CONTEXT))


def test_a_writer_that_waited_for_a_manifest_that_was_replaced_is_refused(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"")
    with path.open("a+b") as file:
        commit.check_in_place(file, tmp_path)
        (tmp_path / "other").write_bytes(b"")
        os.replace(tmp_path / "other", path)
        with pytest.raises(StoreBusyError, match="another process is writing"):
            commit.check_in_place(file, tmp_path)


def rows(start, stop):
    return np.random.default_rng(0).normal(size=(40, 4, 3)).astype(np.float32)[start:stop]


def write(path, n_contexts, keep=None, first=0, **metadata):
    settings = {"chunk_bytes": 100, "shard_bytes": 200, "dtype": "float32", "metadata": metadata}
    with ActivationStoreWriter(path, {"a": 3}, 4, n_contexts=n_contexts, keep_contexts=keep, **settings) as writer:
        first = max(first, writer.n_committed_contexts)
        writer.append({"a": rows(first, n_contexts)}, held_out=np.zeros(n_contexts - first, bool))


def test_a_store_of_ones_own_is_extended_only_if_asked_for(tmp_path):
    write(tmp_path / "s", 10)
    with pytest.raises(StoreError, match="was begun with n_contexts = 10, now asked for 25"):
        write(tmp_path / "s", 25)
    write(tmp_path / "s", 25, keep=9, note="larger")
    write(tmp_path / "whole", 25, note="larger")
    ours, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "s", tmp_path / "whole")
    )
    assert ours == theirs
