"""The staging folder of a store in an object store: locked, and brought in line with the remote manifest.

It is an ordinary store in a local folder, without the files of the shards that were uploaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from ...core.errors import StoreError
from ...core.location import StoreUrl
from ..format.layout import MANIFEST, statistics_key
from ..format.manifest import ShardRecord, parse_manifest
from ..local.durable import close, lock, make_folder, remove_tree


def lock_staging(url: StoreUrl, staging: Path, shared: bool = False) -> IO[bytes]:
    """Lock a staging folder through a file beside it, until that file is closed.

    Raises `StoreBusyError` if another process holds the lock.
    """
    make_folder(staging.parent)
    file = staging.with_suffix(".lock").open("ab")
    try:
        lock(file, url, shared)
    except BaseException:
        close(file)
        raise
    return file


def bring_in_line(staging: Path, uploaded: bytes) -> None:
    """Keep the staging folder if it continues `uploaded`, the remote manifest; otherwise start it again from that."""
    if not _continues(staging, uploaded):
        remove_tree(staging)
        if uploaded:
            make_folder(staging)
            (staging / MANIFEST).write_bytes(uploaded)
    manifest = parse_manifest(uploaded) if uploaded else None
    for record in manifest.shards if manifest else []:
        drop_uploaded(staging, record)


def drop_uploaded(staging: Path, record: ShardRecord) -> None:
    """Remove the staged files of an uploaded shard, except its statistics, which completing the store needs."""
    for key in record.files:
        if key != statistics_key(record.shard):
            (staging / key).unlink(missing_ok=True)


def _continues(staging: Path, uploaded: bytes) -> bool:
    """Return whether the folder's manifest starts with the remote one and all files of its other shards are there."""
    try:
        content = (staging / MANIFEST).read_bytes()
        manifest = parse_manifest(content)
    except (OSError, StoreError):
        return False
    there = parse_manifest(uploaded) if uploaded else None
    if there is None or manifest is None or not content.startswith(uploaded):
        return False
    try:
        return all(
            (staging / key).stat().st_size == file.bytes
            for record in manifest.shards[len(there.shards) :]
            for key, file in record.files.items()
        )
    except OSError:
        return False
