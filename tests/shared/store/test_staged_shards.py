"""Shards that ranks finished out of order: adopted whole, in order, after any cut, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import RankError, StoreBusyError, StoreError
from thresher.shared.core.location import locate, staging_folder
from thresher.shared.store.local import durable
from thresher.shared.store.local.store_folder import StoreFolder
from thresher.shared.store.write import rank_store
from thresher.shared.store.write.rank_writer import RankWriter

N, CONTEXT, HOOK_POINTS = 23, 4, {"a": 6, "b": 3}
SETTINGS = {"chunk_bytes": 50, "shard_bytes": 150, "threads": 1, "n_contexts": N, "codec": "zstd"}


class Cut(Exception):
    """Stands for a kill."""


class Group:
    """A rank whose rank 0 is in the same process, and whose actions' results are passed on."""

    def __init__(self, rank: int, n: int, results: list[object]) -> None:
        self.rank, self.n, self._results = rank, n, results

    def lead(self, action: Callable[[], object]) -> object:
        if self.rank == 0:
            self._results.append(action())
        return self._results[-1]

    def check(self) -> None:
        raise RankError("nobody adopts")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "store"
    write_plain(path)
    return tree(path)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in sorted(path.rglob("*"))}


def give(writer: ActivationStoreWriter, start: int, stop: int) -> None:
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((N, CONTEXT, d), dtype=np.float32)[start:stop] for name, d in HOOK_POINTS.items()}
    tokens = np.arange(N * CONTEXT).reshape(N, CONTEXT)[start:stop]
    writer.append(rows, tokens, held_out=np.arange(start, stop) % 3 == 0, documents=tokens // 7, positions=tokens % 7)


def write_plain(path: Path | str, **more: object) -> None:
    with ActivationStoreWriter(path, HOOK_POINTS, CONTEXT, **SETTINGS, **more) as writer:
        give(writer, writer.n_committed_contexts, N)


def open_ranks(path: Path | str, world: int) -> list[RankWriter]:
    results: list[object] = []
    writers = [RankWriter(path, HOOK_POINTS, CONTEXT, group=Group(r, world, results), **SETTINGS) for r in range(world)]
    for writer in writers:
        writer.watch()
    return writers


def write_assignment(writer: RankWriter) -> None:
    for part in writer.assignment.parts(0, N):
        assert writer.n_contexts == part.start
        give(writer, part.start, part.stop)
    writer.close()


def release(writers: list[RankWriter]) -> None:
    for writer in writers:
        writer.abandon()
        writer.release()


def write_all(writers: list[RankWriter]) -> None:
    """Write every rank's assignment, in the order given, and complete the store."""
    for writer in writers:
        write_assignment(writer)
    first = min(writers, key=lambda writer: writer.assignment.rank)
    assert first.adopt() == N
    first.complete()
    release(writers)


def stage_all_but(path: Path | str, ranks: tuple[int, ...], world: int) -> None:
    """Let the other ranks write their assignments, and all end before the rest is there."""
    writers = open_ranks(path, world)
    for writer in writers:
        if writer.assignment.rank not in ranks:
            write_assignment(writer)
    release(writers)


def staged(path: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (path / ".staged").glob("*"))


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_ranks_in_any_order_leave_the_bytes_of_one_writer(tmp_path, expected, world):
    writers = open_ranks(tmp_path / "store", world)
    write_all(writers[::-1])
    assert tree(tmp_path / "store") == expected
    assert ActivationStore.open(tmp_path / "store").verify() == []
    (tmp_path / "store/.staged").mkdir()
    (fault,) = ActivationStore.open(tmp_path / "store").verify()
    assert fault.endswith("is complete, yet a temporary folder '.staged' is left")


def test_what_is_staged_is_not_in_the_store_until_all_before_it_is(tmp_path):
    stage_all_but(tmp_path / "store", (0,), 3)
    assert staged(tmp_path / "store") == [1, 2, 4, 5, 7]
    store = ActivationStore.open(tmp_path / "store")
    assert store.n_contexts == 0
    assert not store.complete
    assert store.verify() == []


@pytest.mark.parametrize(("world", "lost", "then"), [(3, (1,), 2), (2, (1,), 3), (3, (0, 2), 1), (2, (0,), 5)])
def test_a_lost_part_is_made_by_another_number_of_ranks(tmp_path, expected, world, lost, then):
    path = tmp_path / "store"
    stage_all_but(path, lost, world)
    writers = open_ranks(path, then)
    done = writers[0].assignment.n_done
    assert done == N - sum(min(3, N - 3 * shard) for shard in range(8) if shard % world in lost)
    assert sum(len(part) for writer in writers for part in writer.assignment.parts(0, N)) == N - done
    write_all(writers)
    assert tree(path) == expected


def test_ranks_go_on_where_one_writer_was_cut_off(tmp_path, expected):
    path = tmp_path / "store"
    plain = ActivationStoreWriter(path, HOOK_POINTS, CONTEXT, **SETTINGS)
    give(plain, 0, 8)
    plain.abandon()
    writers = open_ranks(path, 3)
    assert [part for writer in writers for part in writer.assignment.parts(0, N)][:3] == [
        range(6, 9),
        range(15, 18),
        range(9, 12),
    ]
    write_all(writers)
    assert tree(path) == expected


def test_a_writer_that_knows_no_ranks_adopts_what_follows_and_drops_the_rest(tmp_path, expected):
    path = tmp_path / "store"
    stage_all_but(path, (2,), 3)
    assert staged(path) == [1, 3, 4, 6, 7]
    writer = ActivationStoreWriter(path, HOOK_POINTS, CONTEXT, **SETTINGS)
    assert writer.n_committed_contexts == 6
    writer.abandon()
    assert not (path / ".staged").exists()
    write_plain(path)
    assert tree(path) == expected


@pytest.fixture
def all_staged(tmp_path, monkeypatch):
    """A store whose shards are all staged and none committed."""
    path = tmp_path / "staged"
    with monkeypatch.context() as patch:
        patch.setattr(StoreFolder, "adopt", lambda self: None)
        stage_all_but(path, (), 2)
    assert staged(path) == list(range(8))
    return path


def test_adoption_cut_at_any_step_loses_nothing(tmp_path, all_staged, expected, monkeypatch):
    path = tmp_path / "store"
    for step in range(0, 10**6, 7):  # a shard takes a number of steps that 7 does not divide: each is met
        shutil.copytree(all_staged, path)
        steps = iter(range(10**6))

        def cut(_: str, steps=steps, step=step) -> None:
            if next(steps) == step:
                raise Cut

        monkeypatch.setattr(durable, "observer", cut)
        try:
            release(open_ranks(path, 1))
        except Cut:
            was_cut = True
        else:
            was_cut = False
        monkeypatch.setattr(durable, "observer", None)
        (writer,) = open_ranks(path, 1)
        assert writer.assignment.n_done == writer.adopt() == N, step
        writer.complete()
        release([writer])
        assert tree(path) == expected, step
        shutil.rmtree(path)
        if not was_cut:
            break
    assert step > 150


def test_damaged_or_foreign_shards_are_named_dropped_and_made_again(tmp_path, all_staged, expected):
    rng = np.random.default_rng(1)
    for file in sorted(path for path in (all_staged / ".staged/00004").iterdir()):
        path = tmp_path / "store"
        shutil.copytree(all_staged, path)
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (path / ".staged/00004" / file.name).write_bytes(content)
        next((path / ".staged/00006").glob(f"{file.name[:3]}*")).unlink()
        writers = open_ranks(path, 2)
        assert [fault.split(": ")[0].split("'")[0] for fault in writers[0].faults] == [
            "staged shard 4 of ",
            "staged shard 6 of ",
        ]
        assert [part for writer in writers for part in writer.assignment.parts(0, N)] == [range(12, 15), range(18, 21)]
        for writer in writers:
            write_assignment(writer)
        assert writers[0].adopt() == N
        writers[0].complete()
        release(writers)
        assert tree(path) == expected, file.name
        shutil.rmtree(path)


def test_shards_staged_for_another_store_are_not_taken(tmp_path, all_staged):
    path = tmp_path / "store"
    plain = ActivationStoreWriter(path, HOOK_POINTS, CONTEXT, metadata={"other": 1}, **SETTINGS)
    give(plain, 0, 1)
    plain.abandon()
    shutil.copytree(all_staged / ".staged", path / ".staged")
    results: list[object] = []
    writer = RankWriter(path, HOOK_POINTS, CONTEXT, group=Group(0, 1, results), metadata={"other": 1}, **SETTINGS)
    assert writer.assignment.n_done == 0
    assert len(writer.faults) == 8
    release([writer])


def test_while_one_rank_lives_every_other_writer_is_refused(tmp_path):
    path = tmp_path / "store"
    writers = open_ranks(path, 3)
    for world in (1, 2):
        with pytest.raises(StoreBusyError, match="another process is writing to the store"):
            open_ranks(path, world)
    release(writers[:2])
    with pytest.raises(StoreBusyError):
        write_plain(path)
    release(writers[2:])
    write_plain(path)
    with ActivationStoreWriter(tmp_path / "own", HOOK_POINTS, CONTEXT, **SETTINGS) as plain:
        give(plain, 0, N)
        with pytest.raises(StoreBusyError):
            open_ranks(tmp_path / "own", 2)


def test_a_rank_that_ended_is_noticed(tmp_path):
    writers = open_ranks(tmp_path / "store", 3)
    assert [writer.liveness.gone() for writer in writers] == [[], [], []]
    writers[2].liveness.close()
    assert [writer.liveness.gone() for writer in writers[:2]] == [[2], []]
    writers[0].liveness.close()
    assert writers[1].liveness.gone() == [0]
    release(writers)


def test_ranks_that_do_not_write_the_same_store_are_refused(tmp_path):
    results: list[object] = []
    first = RankWriter(tmp_path / "a", HOOK_POINTS, CONTEXT, group=Group(0, 2, results), **SETTINGS)
    with pytest.raises(StoreError, match="was begun with context_size = 4, now asked for 2"):
        RankWriter(tmp_path / "a", HOOK_POINTS, 2, group=Group(1, 2, results), **SETTINGS)
    with pytest.raises(RankError, match=r"rank 1 does not see the store '.*b' that rank 0 began"):
        RankWriter(tmp_path / "b", HOOK_POINTS, CONTEXT, group=Group(1, 2, results), **SETTINGS)
    with pytest.raises(RankError, match="rank 1 does not write to the same folder"):
        first.watch()
    release([first])


def files(tree: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in tree.items() if content}


@pytest.mark.parametrize(("world", "lost", "then"), [(2, (), 0), (3, (), 0), (3, (1,), 2), (2, (0,), 1), (2, (1,), 3)])
def test_ranks_leave_the_objects_of_one_writer(s3, objects, tmp_path, expected, monkeypatch, world, lost, then):
    monkeypatch.setattr(rank_store, "SHARDS_AHEAD", N)  # each rank writes its assignment before the next one begins
    url = s3()
    if lost:
        stage_all_but(url, lost, world)
        store = ActivationStore.open(url)
        assert (store.n_contexts, store.verify()) == (0 if 0 in lost else 3, [])
    left = [shard for shard in range(8) if not lost or shard % world in lost]
    writers = open_ranks(url, then or world)
    assert sum(len(part) for w in writers for part in w.assignment.parts(0, N)) == sum(min(3, N - 3 * s) for s in left)
    write_all(writers[::-1])
    assert objects.read(url) == files(expected), "and no lease is left"
    assert [path.suffix for path in (tmp_path / "cache" / "writing").iterdir()] == [".lock"]


def test_while_one_rank_lives_every_other_writer_of_its_objects_is_refused(s3, objects, tmp_path, expected):
    url = s3()
    writers = open_ranks(url, 2)
    with pytest.raises(StoreBusyError, match=f"another process is writing to the store '{url}'; wait"):
        write_plain(url)
    with pytest.raises(StoreBusyError, match=r"another process is writing .* run again in 1[12]\d seconds"):
        write_plain(url, cache=tmp_path / "elsewhere")
    release(writers[:1])
    write_plain(url, cache=tmp_path / "elsewhere")
    assert objects.read(url) == files(expected), "rank 1 has nothing to do with what is uploaded"
    with pytest.raises(StoreBusyError, match=f"another process is writing to the store '{url}'; wait"):
        write_plain(url)
    assert (staging_folder(locate(url)) / ".partial" / "rank-1.alive").exists(), "the folder is rank 1's while it lives"
    release(writers[1:])
    ActivationStoreWriter(url, HOOK_POINTS, CONTEXT, **SETTINGS).close()
    assert not staging_folder(locate(url)).exists()


def test_a_rank_far_ahead_of_what_is_uploaded_waits_unless_the_others_end(s3, tmp_path):
    writers = open_ranks(url := s3(), 2)
    with pytest.raises(RankError, match="nobody adopts"):
        write_assignment(writers[1])
    assert staged(staging_folder(locate(url))) == [1, 3, 5], "2 for each rank, and one that waits"
    release(writers)
    writers = open_ranks(tmp_path / "store", 2)
    write_assignment(writers[1])
    assert staged(tmp_path / "store") == [1, 3, 5, 7], "in a folder they would only lie elsewhere"
    release(writers)


def test_a_rank_that_waits_continues_when_the_first_has_adopted(s3, objects, expected, monkeypatch):
    monkeypatch.setattr(rank_store, "SHARDS_AHEAD", 1)
    monkeypatch.setattr(rank_store, "POLL_SECONDS", 0.001)
    url = s3()
    first, second = open_ranks(url, 2)
    parts = iter(first.assignment.parts(0, N))
    checks = []

    def check(self: Group) -> None:
        """Let the first rank make its next shard when the second one is held up."""
        if self.rank == 1 and (part := next(parts, None)) is not None:
            checks.append(part)
            give(first, part.start, part.stop)

    monkeypatch.setattr(Group, "check", check)
    write_assignment(second)
    assert len(checks) >= 3
    for part in parts:
        give(first, part.start, part.stop)
    first.close()
    assert first.adopt() == N
    first.complete()
    release([first, second])
    assert objects.read(url) == files(expected)
