"""What a user can do wrong, or a disk: one clear line, and nothing half-written looks complete."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import (
    ConfigError,
    DiskSpaceError,
    MissingFileError,
    NonFiniteError,
    StoreBusyError,
    StoreError,
)
from thresher.shared.store.local import durable

HOOKS = {"a": 12, "b": 5}
SMALL = {"chunk_bytes": 200, "shard_bytes": 2000}


def batch(n: int = 41, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full((n, 8, d), value) + torch.arange(d) for name, d in HOOKS.items()}


def writer(path: Path, **settings) -> ActivationStoreWriter:
    return ActivationStoreWriter(path, HOOKS, 8, **(SMALL | settings))


def write(path: Path, *batches: dict[str, torch.Tensor], **settings) -> None:
    with writer(path, **settings) as w:
        for one in batches:
            w.append(one)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "a value beyond bfloat16's range")])
def test_a_value_that_is_not_finite_names_hook_and_context(tmp_path: Path, value: float, kind: str) -> None:
    bad = batch(3)
    bad["b"][1, 6, 2] = value
    with pytest.raises(NonFiniteError, match=rf"hook point 'b', context 42, position 6: .* got {kind}"):
        write(tmp_path / "s", batch(), bad)
    store = ActivationStore.open(tmp_path / "s")
    assert not store.complete
    assert store.n_contexts == 40, "whole shards of the good batch stay"
    assert store.verify() == []
    with writer(tmp_path / "s") as again:
        assert again.n_committed_contexts == 40
        again.append(batch(1))
    assert ActivationStore.open(tmp_path / "s").complete


def test_a_number_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="got a value beyond float16's range"):
        write(tmp_path / "s", batch(value=7e4), dtype="float16")


def test_a_second_writer_is_refused_and_the_first_continues(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as first:
        first.append(batch())
        with pytest.raises(StoreBusyError, match="another process is writing to the store"):
            writer(tmp_path / "s")
    assert ActivationStore.open(tmp_path / "s").n_contexts == 41


def test_a_full_disk_keeps_what_is_committed(tmp_path: Path) -> None:
    """The largest file that the process may write is limited: the third shard does not fit."""
    rows = {name: torch.randn(60, 8, d, generator=torch.Generator().manual_seed(1)) for name, d in HOOKS.items()}
    with writer(tmp_path / "whole") as w:
        w.append(rows)
    steps: list[str] = []

    def fill_up(step: str) -> None:
        steps.append(step)
        if step == "write a.2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    durable.observer = fill_up
    try:
        with pytest.raises(DiskSpaceError, match="is full; the committed shards stay readable"):
            write(tmp_path / "s", rows)
    finally:
        durable.observer = None
    store = ActivationStore.open(tmp_path / "s")
    assert (store.complete, len(store.manifest.shards), store.verify()) == (False, 2, [])
    assert torch.equal(store.read("a", 0, store.n_rows), rows["a"].bfloat16().reshape(-1, 12)[: store.n_rows])
    with writer(tmp_path / "s") as w:
        w.append({name: part[w.n_committed_contexts :] for name, part in rows.items()})
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "s" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_the_limit_of_the_system_on_a_file_is_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    w = ActivationStoreWriter(tmp_path / "s", HOOKS, 8)
    rows = {name: torch.randn(4000, 8, d) for name, d in HOOKS.items()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(DiskSpaceError), w:
            w.append(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ActivationStore.open(tmp_path / "s").n_rows == 0


def test_a_path_that_is_no_store_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no activation store at"):
        ActivationStore.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match=r"is not an activation store: it has no manifest\.jsonl"):
        ActivationStore.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is not an activation store"):
        ActivationStore.open(tmp_path / "file")
    with pytest.raises(StoreError, match="expected a folder for the store, got a file"):
        writer(tmp_path / "file")
    with pytest.raises(StoreError, match="holds other files and no store"):
        writer(tmp_path)
    for impossible in ("a\0b", "x" * 300):
        with pytest.raises(ConfigError, match="cannot keep a store at"):
            writer(tmp_path / impossible)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.jsonl").write_text("")
    with pytest.raises(StoreError, match="is empty: its writer was interrupted at the start"):
        ActivationStore.open(tmp_path / "s")


def test_other_settings_than_the_store_was_begun_with_are_named(tmp_path: Path) -> None:
    unfinished = writer(tmp_path / "s", metadata={"model": "gpt2", "layers": (1, 2)})
    unfinished.append(batch())
    unfinished.abandon()
    with pytest.raises(StoreError, match=r"was begun with metadata = .*gpt2.*, now asked for .*pythia"):
        writer(tmp_path / "s", metadata={"model": "pythia", "layers": (1, 2)})
    with pytest.raises(StoreError, match="was begun with codec = 'lz4', now asked for 'zstd'"):
        writer(tmp_path / "s", codec="zstd", metadata={"model": "gpt2", "layers": (1, 2)})
    with pytest.raises(StoreError, match="already holds a store; remove it"):
        writer(tmp_path / "s", resume=False)
    with writer(tmp_path / "s", metadata={"model": "gpt2", "layers": [1, 2]}) as w:
        assert w.n_committed_contexts in range(41)


def test_a_complete_store_takes_no_more(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as w:
        w.append(batch())
    with writer(tmp_path / "s") as again:
        assert again.n_committed_contexts == 41
        with pytest.raises(StoreError, match="is complete with 41 contexts"):
            again.append(batch(1))
    with pytest.raises(StoreError, match=r"the writer of .* is closed"):
        again.append(batch(1))
    with pytest.raises(StoreError, match="was declared with 40 contexts; got 41"):
        write(tmp_path / "t", batch(), n_contexts=40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hook_points": {}}, "expected at least one hook point"),
        ({"hook_points": {"../a": 3}}, r"hook point '\.\./a' cannot name an array"),
        ({"hook_points": {"tokens": 3}}, "hook point 'tokens' cannot name an array"),
        ({"hook_points": {"a": 0}}, "expected a width of at least 1, got 0"),
        ({"context_size": 0}, "expected a context_size of at least 1, got 0"),
        ({"dtype": "int4"}, "expected dtype to be one of bfloat16, float16, float32; got 'int4'"),
        ({"codec": "gzip"}, "expected codec to be one of none, lz4, zstd, int8; got 'gzip'"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActivationStoreWriter(tmp_path / "s", **({"hook_points": HOOKS, "context_size": 8} | settings))
    assert not (tmp_path / "s").exists()


def test_roles_are_not_wrapped_around(tmp_path: Path) -> None:
    w = ActivationStoreWriter(tmp_path / "s", {"a": 4}, 8, roles=True)
    with w, pytest.raises(ConfigError, match="expected roles that fit int8, got -256 to -256"):
        w.append({"a": torch.zeros(2, 8, 4)}, roles=np.full((2, 8), -256))


def test_masked_tokens_need_tokens(tmp_path: Path) -> None:
    w = ActivationStoreWriter(tmp_path / "s", {"a": 4}, 8, mask_token_ids=[0])
    with w, pytest.raises(ConfigError, match="a batch has no tokens to find them by"):
        w.append({"a": torch.zeros(2, 8, 4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": {"a": torch.zeros(2, 8, 12)}}, "expected activations of a, b; got a"),
        ({"activations": batch(2) | {"b": torch.zeros(2, 7, 5)}}, r"'b': expected .* \(2, 8, 5\), got \(2, 7, 5\)"),
        ({"activations": batch(2) | {"b": torch.zeros(2, 8, 5, dtype=torch.int64)}}, "'b': expected .* floats, got"),
        ({"tokens": np.zeros((2, 8))}, "expected tokens of integers"),
        ({"tokens": np.zeros((2, 7), dtype=int)}, r"expected tokens of integers of shape \(2, 8\)"),
        ({"tokens": np.full((2, 8), 2**40)}, "expected tokens that fit int32"),
        ({"tokens": np.full((2, 8), -(2**40))}, "expected tokens that fit int32"),
        ({"held_out": [True]}, r"expected held_out of integers of shape \(2,\)"),
        ({"held_out": [1, 4]}, r"expected held_out of true and false, one for each context, got \[1, 4\]"),
    ],
)
def test_a_batch_is_checked_before_any_of_it_is_stored(tmp_path: Path, change: dict, message: str) -> None:
    good = {"activations": batch(2), "tokens": np.zeros((2, 8), dtype=int)}
    with writer(tmp_path / "s") as w:
        with pytest.raises(ConfigError, match=message):
            w.append(**(good | change))
        w.append(**good)
        with pytest.raises(ConfigError, match="was begun with tokens; got a batch with none"):
            w.append(batch(2))
    assert ActivationStore.open(tmp_path / "s").n_contexts == 2
