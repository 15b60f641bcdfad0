"""Write a store to an object store: shards are made safe in a local staging folder, then uploaded in order.

The staging folder is an ordinary store, less the shards that were uploaded. Of a shard the files go first, and then
the manifest that names them, put on the condition that nobody changed it since. Ranks that write together share the
folder: rank 0 adopts in it what they stage, as in any store, and uploads what it adopted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import IO, Any

from ...core.errors import MissingFileError, StoreBusyError, StoreError
from ...core.location import StoreUrl, staging_folder
from ..format.layout import MANIFEST, STATISTICS, Header, statistics_key
from ..format.manifest import Manifest, ShardRecord, manifest_of, parse_manifest
from ..format.zarr_metadata import metadata_files
from ..local.durable import close, lock, make_folder, remove_tree
from ..local.store_folder import StoreFolder
from .lease import LEASE, Lease
from .objects import ChangedObjectError, RemoteStore
from .remote_files import read_object

SHARDS_WAITING = 2
"""Shards that may wait to be uploaded; then the writer waits."""


class RemoteStoreFolder(StoreFolder):
    """The staging folder of a remote store, and what is uploaded from it; open it with `open_remote`."""

    _remote: RemoteStore | None = None

    def connect(self, remote: RemoteStore, lease: Lease, held: IO[bytes], uploaded: bytes, version: Any) -> None:
        """Begin to upload: first what an earlier writer had left to upload, `uploaded` being the remote manifest."""
        self._lease = lease
        self._held = held
        self._version = version
        self._content = (self.path / MANIFEST).read_bytes()
        self._uploads = Uploads()
        there = parse_manifest(uploaded) if uploaded else None
        self._is_complete = there is not None and there.completion is not None
        self._remote = remote
        manifest = self._manifest
        if manifest is None or self._is_complete:
            return
        if manifest.completion is None:
            self._put_metadata()
        n_bytes = len(uploaded)
        for record in manifest.shards[len(there.shards) if there else 0 :]:
            n_bytes = self._content.index(b"\n", n_bytes) + 1
            self._upload_later(record, self._content[:n_bytes])

    def start(self, header: Header) -> Header:
        """Begin the store, or declare it anew: its header line, then the metadata of its arrays."""
        self._uploads.wait()
        header = super().start(header)
        self._put_manifest(self._content)
        self._put_metadata()
        return header

    def admit_ranks(self) -> None:
        """Share the locks with the processes of one group; the lease stays this process's."""
        assert self._remote is not None
        super().admit_ranks()
        lock(self._held, self._remote.url, shared=True)

    def _follow(self, content: bytes) -> None:
        self._content = content
        self._is_complete = False

    def _append(self, line: bytes) -> None:
        super()._append(line)
        if self._remote is not None:
            self._content += line

    def _add(self, entry: ShardRecord) -> None:
        super()._add(entry)
        if self._remote is not None:
            self._upload_later(entry, self._content)

    def _upload_later(self, record: ShardRecord, manifest: bytes) -> None:
        self._uploads.add(lambda: self._upload(record, manifest))

    def _upload(self, record: ShardRecord, manifest: bytes) -> None:
        """Upload a shard's files, then the manifest that names it; then the staged copies can go."""
        assert self._remote is not None
        self._lease.check()
        for key in record.files:
            self._remote.put(key, self.path / key)
        self._put_manifest(manifest)
        drop_uploaded(self.path, record)

    def _put_manifest(self, content: bytes) -> None:
        assert self._remote is not None
        try:
            self._version = self._remote.replace(MANIFEST, content, self._version)
        except ChangedObjectError:
            raise StoreBusyError(
                f"another process has written to the store '{self._remote.url}'; "
                "let it finish, or stop it and start again"
            ) from None

    def _put_metadata(self) -> None:
        assert self._remote is not None
        assert self._manifest is not None
        for key in metadata_files(self._manifest.header, 0):
            self._remote.put(key, self.path / key)

    def complete(self) -> None:
        """Upload what waits, complete the staged store, and upload the files that this made and the last manifest."""
        assert self._remote is not None
        assert self._manifest is not None
        self._uploads.wait()
        if self._is_complete:
            return
        self._fetch_statistics(self._manifest)
        super().complete()
        self._lease.check()
        self._remote.put(STATISTICS, self.path / STATISTICS)
        self._put_metadata()
        self._put_manifest(self._content)
        self._is_complete = True

    def _fetch_statistics(self, manifest: Manifest) -> None:
        """Fetch the statistics of shards that were uploaded from elsewhere, or by a writer whose staging is gone."""
        assert self._remote is not None
        for record in manifest.shards:
            path = self.path / statistics_key(record.shard)
            if not path.exists():
                make_folder(path.parent)
                path.write_bytes(read_object(self._remote, statistics_key(record.shard), record.files))

    def close(self) -> None:
        """Upload what is committed, as far as it can be, and give the store free."""
        self._uploads.close()
        super().close()
        if self._is_complete:
            remove_tree(self.path)
        self._lease.release()
        close(self._held)


class Uploads:
    """Actions done in order by one thread; after one failed, the others are not done."""

    def __init__(self) -> None:
        self._queue: Queue[Callable[[], None] | None] = Queue(SHARDS_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="store-upload", daemon=True)
        self._thread.start()

    def add(self, action: Callable[[], None]) -> None:
        """Do an action later; wait while too many are. Raise what an earlier one did."""
        self._check()
        self._queue.put(action)

    def wait(self) -> None:
        """Wait until all is done; raise what went wrong."""
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Do what is left, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _check(self) -> None:
        if isinstance(self._error, StoreError):
            raise type(self._error)(*self._error.args) from self._error
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            action = self._queue.get()
            try:
                if action is None:
                    return
                if self._error is None:
                    action()
            except BaseException as error:  # handed to the writer by add() and wait()
                self._error = error
            finally:
                self._queue.task_done()


def open_remote(
    url: StoreUrl,
    proposed: Header,
    resume: bool,
    any_level: bool,
    cache: str | Path | None,
    keep_staged: bool = False,
    keep_contexts: int | None = None,
) -> RemoteStoreFolder:
    """Open a remote store for writing: its staging folder locked, its lease taken, both brought in line.

    Finished shards of ranks that wait behind a gap are kept if asked for, as by `StoreFolder.open`.
    """
    remote = RemoteStore(url)
    staging = staging_folder(url, cache)
    held = lock_staging(url, staging)
    lease = None
    try:
        remote_manifest(remote)  # before a lease is put where no store may be
        lease = Lease(remote, staging)
        lease.acquire()
        uploaded, version = remote_manifest(remote)
        bring_in_line(staging, uploaded)
        try:
            folder = RemoteStoreFolder.open(staging, proposed, resume, any_level, keep_staged, keep_contexts)
        except StoreError as error:
            raise type(error)(str(error).replace(str(staging), str(url))) from None
        assert isinstance(folder, RemoteStoreFolder)
        folder.connect(remote, lease, held, uploaded, version)
    except BaseException:
        if lease is not None:
            lease.release()
        close(held)
        raise
    return folder


def lock_staging(url: StoreUrl, staging: Path, shared: bool = False) -> IO[bytes]:
    """Lock a staging folder, by a file beside it, until that is closed; raise `StoreBusyError` if another has it."""
    make_folder(staging.parent)
    file = staging.with_suffix(".lock").open("ab")
    try:
        lock(file, url, shared)
    except BaseException:
        close(file)
        raise
    return file


def remote_manifest(remote: RemoteStore) -> tuple[bytes, Any]:
    """Return the manifest's content, which is checked, and version; nothing and None if no store is there yet."""
    try:
        content, version = remote.get_version(MANIFEST)
    except MissingFileError:
        if not remote.is_empty(but=LEASE):
            raise StoreError(f"'{remote.url}' holds other objects and no store; name another prefix") from None
        return b"", None
    manifest_of(remote.url, content)
    return content, version


def bring_in_line(staging: Path, uploaded: bytes) -> None:
    """Make the staging folder follow the remote manifest: keep what goes on from it, or else begin from it anew."""
    if not _goes_on(staging, uploaded):
        remove_tree(staging)
        if uploaded:
            make_folder(staging)
            (staging / MANIFEST).write_bytes(uploaded)
    manifest = parse_manifest(uploaded) if uploaded else None
    for record in manifest.shards if manifest else []:
        drop_uploaded(staging, record)


def _goes_on(staging: Path, uploaded: bytes) -> bool:
    """Tell whether a staging folder holds the remote manifest's lines and every file of the shards behind them."""
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


def drop_uploaded(staging: Path, record: ShardRecord) -> None:
    """Remove the staged files of a shard that was uploaded, but for its statistics, which the last step needs."""
    for key in record.files:
        if key != statistics_key(record.shard):
            (staging / key).unlink(missing_ok=True)
