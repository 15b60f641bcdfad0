"""The machine's own limits: a file system that is really full, and how much memory a writer takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import DiskSpaceError

ROWS = torch.randn(600, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "thresher-test", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a file system of limited size")
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # mapped shards may still be open


def write(path: Path) -> None:
    with ActivationStoreWriter(path, {"a": 64}, 8, codec="none", chunk_bytes=4096, shard_bytes=65536) as writer:
        writer.append({"a": ROWS[writer.n_committed_contexts :]})


@pytest.mark.long
def test_a_disk_that_is_really_full_keeps_what_is_committed(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "other").write_bytes(bytes(200_000))
    with pytest.raises(DiskSpaceError, match="is full; the committed shards stay readable"):
        write(small_disk / "s")
    store = ActivationStore.open(small_disk / "s")
    assert not store.complete
    assert 0 < store.n_contexts < 600
    assert store.verify() == []
    assert torch.equal(store.read("a", 0, store.n_rows), ROWS.bfloat16().reshape(-1, 64)[: store.n_rows])
    with pytest.raises(DiskSpaceError):
        write(small_disk / "s")
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    write(small_disk / "s")
    write(tmp_path / "whole")
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        assert (small_disk / "s" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


PEAK = """
import resource, sys
import torch
from thresher.shared import ActivationStoreWriter
from thresher.shared.store.local import durable
durable.flush = lambda handle: None
folder, pending, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = torch.randn(64, 128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
def write(name, parts):
    settings = {"codec": "zstd", "codec_level": 3, "shard_bytes": 16 << 20, "threads": 1}
    with ActivationStoreWriter(f"{folder}/{name}", {"a": 256}, 128, pending_bytes=pending, **settings) as writer:
        for part in parts:
            writer.append({"a": part})
    return writer.raw_bytes
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
write("first", [rows[:8]])  # loads what is loaded on first use
before = peak()
raw = write("s", [rows] * batches)
print(peak() - before, raw)
"""


@pytest.mark.long
@pytest.mark.parametrize("pending", [4 << 20, 32 << 20])
def test_a_writer_that_cannot_keep_up_takes_no_more_memory_than_its_bound(tmp_path: Path, pending: int) -> None:
    """The caller hands over 128 MiB faster than one thread compresses them."""
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(pending), "32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, raw = map(int, done.stdout.split())
    assert raw == 128 << 20
    # The rows that wait and their compressed copies; beside them one batch of 4 MiB in the stored dtype, and what
    # a chunk's moments in float64 and the allocator take.
    assert grown < 2 * pending + (24 << 20), f"{grown / 2**20:.1f} MiB"
