"""Connections that drop, servers that do not answer, and writers that are killed: nothing is lost, nothing is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from thresher.harvest.reuse import is_complete
from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import MissingFileError, StoreBusyError, UnreachableError
from thresher.shared.core.location import locate
from thresher.shared.store.remote import objects as remote
from thresher.shared.store.remote.lease import LEASE
from thresher.shared.store.remote.objects import RemoteStore

WRITER = textwrap.dedent(
    """
    import torch
    from thresher.shared import ActivationStoreWriter

    N, CONTEXT, WIDTHS = 32, 8, {"a": 600, "b": 5}

    def write(place, **settings):
        generator = torch.Generator().manual_seed(0)
        rows = {name: torch.randn(N, CONTEXT, d, generator=generator) for name, d in WIDTHS.items()}
        settings = {"chunk_bytes": 5000, "shard_bytes": 40_000, "codec": "none"} | settings
        with ActivationStoreWriter(place, WIDTHS, CONTEXT, **settings) as writer:
            for i in range(writer.n_committed_contexts, N):
                writer.append({name: values[i : i + 1] for name, values in rows.items()})
    """
)
exec(WRITER)

KILLED = WRITER + textwrap.dedent(
    """
    import os, sys
    import thresher.shared.store.remote.remote_folder
    for place in sys.stdin:
        child = os.fork()
        if not child:
            write(place.strip())
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_download_that_is_cut_resumes_where_it_was(s3, proxy, objects, tmp_path, monkeypatch):
    url = s3()
    write(url)
    monkeypatch.setattr(remote, "PIECE_BYTES", 5000)
    size = len(objects.read(url)["a/c.1.0"])
    store = ActivationStore.open(url)
    before = proxy.bytes_down
    proxy.cut_down = [2000, 4000, 3000]
    rows = store.read("a", store.shard_rows, 2 * store.shard_rows)
    assert proxy.n_cuts == 3
    assert proxy.bytes_down - before < size + 3 * 4000 + 6000, "what had come was not asked for again"
    write(tmp_path / "local")
    local = ActivationStore.open(tmp_path / "local")
    assert torch.equal(rows, local.read("a", store.shard_rows, 2 * store.shard_rows))


def test_an_upload_that_is_cut_is_tried_again(s3, proxy, objects, tmp_path):
    url = s3()
    write(tmp_path / "local")
    proxy.cut_up = [30_000, 2000, 25_000, 35_000]
    write(url)
    assert proxy.n_cuts == 4
    assert objects.read(url) == tree(tmp_path / "local")


def test_a_server_that_does_not_answer_is_given_up_in_one_line(s3, proxy, monkeypatch, objects, tmp_path):
    url = s3()
    write(url)
    store = ActivationStore.open(url)
    proxy.refuse = True
    proxy.cut_down = [0] * 100
    with pytest.raises(UnreachableError, match=rf"(?m)^cannot read 'a/c\.0\.0' in '{url}': failed 5 times .*$"):
        store.read("a", 0, 10)
    with pytest.raises(UnreachableError):
        store.verify()
    proxy.refuse, proxy.cut_down = False, []
    assert len(store.read("a", 0, 10)) == 10

    other = s3()
    proxy.on_up = lambda n_bytes: proxy.cut_up.extend([0] * 100) if n_bytes > 150_000 and not proxy.cut_up else None
    proxy.bytes_up = 0
    with pytest.raises(UnreachableError, match="failed 5 times"):
        write(other)
    proxy.on_up, proxy.cut_up = lambda n_bytes: None, []
    write(other)
    assert objects.read(other) == objects.read(url), "what was committed and not uploaded went first, the rest followed"


def test_a_writer_killed_anywhere_resumes_to_the_same_objects(s3, proxy, objects, tmp_path):
    write(tmp_path / "local")
    expected = tree(tmp_path / "local")
    total = sum(map(len, expected.values()))
    driver = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        for fraction in (0.05, 0.5, 0.98):
            url = s3()
            child: list[int] = []
            started = threading.Event()

            def kill(n_bytes: int, fraction=fraction, child=child, started=started) -> None:
                if n_bytes > fraction * total and started.wait(30) and child:
                    os.kill(child.pop(), signal.SIGKILL)

            proxy.bytes_up, proxy.on_up = 0, kill
            print(url, file=driver.stdin, flush=True)
            child.append(int(driver.stdout.readline()))
            started.set()
            assert int(driver.stdout.readline()) == -signal.SIGKILL
            proxy.on_up = lambda n_bytes: None
            there = objects.read(url)
            if "manifest.jsonl" in there:
                store = ActivationStore.open(url)
                assert not store.complete
                assert [fault for fault in store.verify() if "not finished" not in fault] == []
            write(url)
            assert objects.read(url) == expected
    finally:
        driver.stdin.close()
        driver.stdout.close()
        driver.wait()


def test_another_machine_waits_for_the_lease_and_then_resumes(s3, objects, tmp_path, monkeypatch):
    write(tmp_path / "local")
    url = s3()
    writer = ActivationStoreWriter(url, WIDTHS, CONTEXT, chunk_bytes=5000, shard_bytes=40_000, codec="none")
    lease = json.loads(objects.read(url)[LEASE])
    writer.abandon()
    assert LEASE not in objects.read(url)
    objects.write(url, LEASE, json.dumps(lease | {"host": "elsewhere"}).encode())
    with pytest.raises(StoreBusyError, match=rf"{lease['process']} on elsewhere; wait until it ends"):
        write(url, cache=tmp_path / "other")
    objects.write(url, LEASE, json.dumps(lease | {"host": "elsewhere", "expires": 1.0}).encode())
    write(url, cache=tmp_path / "other")
    assert objects.read(url) == tree(tmp_path / "local")


def test_a_writer_killed_before_its_first_manifest_leaves_no_store_and_resumes(s3, objects, tmp_path):
    url, killed = s3(), s3()
    settings = {"chunk_bytes": 5000, "shard_bytes": 40_000, "codec": "none"}
    with ActivationStoreWriter(url, WIDTHS, CONTEXT, **settings) as writer:
        writer.write_beside("harvest.toml", "seed = 1")
        (lease,) = objects.read(url).values()
    assert objects.read(url)["harvest.toml"] == b"seed = 1"
    objects.write(killed, LEASE, json.dumps(json.loads(lease) | {"expires": 1.0}).encode())
    assert not is_complete(locate(killed), {}), "as a harvest asks before it begins"
    with pytest.raises(MissingFileError, match=f"no activation store at '{killed}'"):
        ActivationStore.open(killed)
    write(killed)
    write(tmp_path / "local")
    assert objects.read(killed) == tree(tmp_path / "local")


def test_a_writer_whose_store_was_changed_by_another_stops(s3, objects):
    url = s3()
    writer = ActivationStoreWriter(url, WIDTHS, CONTEXT, chunk_bytes=5000, shard_bytes=40_000, codec="none")
    rows = {name: torch.zeros(8, CONTEXT, d) for name, d in WIDTHS.items()}
    writer.append(rows)
    other = objects.read(url)["manifest.jsonl"] + b"{"
    objects.write(url, "manifest.jsonl", other)

    def go_on() -> None:
        for _ in range(50):
            writer.append(rows)
        writer.close()

    with pytest.raises(StoreBusyError, match="another process has written to the store"):
        go_on()
    writer.abandon()
    assert objects.read(url)["manifest.jsonl"] == other, "the other's manifest was not overwritten"


def test_processes_share_one_copy(s3, proxy, tmp_path):
    url = s3()
    write(url)
    stores = [ActivationStore.open(url) for _ in range(6)]
    before = proxy.bytes_down
    ready = threading.Barrier(len(stores))
    rows: list[torch.Tensor] = []

    def read(store: ActivationStore) -> None:
        ready.wait()
        rows.append(store.read("a", 0, store.shard_rows))

    threads = [threading.Thread(target=read, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows) == len(stores)
    assert all(torch.equal(part, rows[0]) for part in rows)
    size = stores[0].manifest.shards[0].files["a/c.0.0"].bytes
    assert proxy.bytes_down - before < 2 * size, "one of them fetched it"
    assert RemoteStore(locate(url)).size("a/c.0.0") == size


READERS = textwrap.dedent(
    """
    import os, sys
    import torch
    from thresher.shared import ActivationStore

    def read(url, local, cache_bytes, seed):
        remote, here = ActivationStore.open(url, cache_bytes=cache_bytes), ActivationStore.open(local)
        order = torch.randperm(here.n_chunks, generator=torch.Generator().manual_seed(seed))
        for name in here.hook_points:
            for chunks in order.split(3):
                assert torch.equal(remote.read_chunks(name, chunks.numpy()), here.read_chunks(name, chunks.numpy()))

    url, local, cache_bytes, n = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    gate, opened = os.pipe()
    children = []
    for seed in range(n):
        if not (child := os.fork()):
            os.close(opened)
            os.read(gate, 1)  # ends when the parent has started all
            read(url, local, cache_bytes, seed)
            os._exit(0)
        children.append(child)
    os.close(opened)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
    """
)


@pytest.mark.parametrize("n_shards", [2, 100])
def test_processes_that_read_one_cache_folder_at_once_read_what_is_stored(s3, tmp_path, n_shards):
    """Also where it holds fewer shards than they have open, so that each removes what the others fetched."""
    url = s3()
    write(url)
    write(tmp_path / "local")
    store = ActivationStore.open(tmp_path / "local")
    assert len(store.manifest.shards) > 2
    largest = max(f.bytes for shard in store.manifest.shards for f in shard.files.values())
    command = [sys.executable, "-c", READERS, url, str(tmp_path / "local"), str(n_shards * largest), "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = [path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()]
    assert sum(held) <= n_shards * largest
    assert not list((tmp_path / "cache" / "partial").iterdir())
