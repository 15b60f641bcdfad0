"""Write a store to an object store: commit shards to a local staging folder, and upload them in order.

Of each shard the files are uploaded first, then the manifest that names them, on the condition that nobody changed it
in between. Ranks that write together share the staging folder: rank 0 adopts their staged shards there, as in any
store, and uploads what it adopted.
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
from ..format.manifest import ShardRecord, manifest_of, parse_manifest
from ..format.zarr_metadata import metadata_files
from ..local.durable import close, lock, make_folder, remove_tree
from ..local.shard_writer import WrittenShard
from ..local.staged_shards import StagedShard
from ..local.store_folder import StoreFolder
from .lease import LEASE, Lease
from .objects import ChangedObjectError, RemoteStore
from .remote_files import read_object
from .staging import bring_in_line, drop_uploaded, lock_staging

SHARDS_WAITING = 2
"""Shards that may wait for their upload; the writer blocks if there are more."""


class RemoteStoreFolder:
    """A store's staging folder, and the upload of what is committed to it; open it with `open_remote`.

    `uploaded` and `version` are the remote manifest's content (empty if there is none) and version, `held` the locked
    file of the staging folder. What an earlier writer committed but did not upload is uploaded first.
    """

    def __init__(
        self, folder: StoreFolder, remote: RemoteStore, lease: Lease, held: IO[bytes], uploaded: bytes, version: Any
    ) -> None:
        self.partial = folder.partial
        self.faults = folder.faults
        self._folder = folder
        self._remote = remote
        self._lease = lease
        self._held = held
        self._version = version
        self._uploads = Uploads()
        there = parse_manifest(uploaded) if uploaded else None
        self._is_complete = there is not None and there.completion is not None
        folder.on_commit = self._upload_later
        if not self._is_complete and self._manifest_bytes():
            self._upload_rest(len(there.shards) if there else 0, len(uploaded))

    def _upload_rest(self, first: int, n_bytes: int) -> None:
        """Upload the shards from number `first` on; the remote manifest has `n_bytes`."""
        manifest = self._folder.manifest
        if manifest.completion is None:
            self._put_metadata()
        content = self._manifest_bytes()
        for record in manifest.shards[first:]:
            n_bytes = content.index(b"\n", n_bytes) + 1
            self._uploads.add(lambda record=record, part=content[:n_bytes]: self._upload(record, part))

    @property
    def header(self) -> Header | None:
        """The store's header, or None until `start` begins the store or declares it anew."""
        return self._folder.header

    @property
    def n_contexts(self) -> int:
        """Contexts in the committed shards that are kept."""
        return self._folder.n_contexts

    @property
    def may_append(self) -> bool:
        """Whether more shards may follow."""
        return self._folder.may_append

    @property
    def staged(self) -> dict[int, StagedShard]:
        """The shards that ranks staged, by number."""
        return self._folder.staged

    def start(self, header: Header) -> Header:
        """Begin the store, or declare it anew, and upload its manifest and the metadata of its arrays."""
        self._uploads.wait()
        header = self._folder.start(header)
        self._is_complete = False
        self._put_manifest(self._manifest_bytes())
        self._put_metadata()
        return header

    def commit(self, shard: WrittenShard) -> None:
        """Add a written shard to the staged store; it is uploaded in the background."""
        self._folder.commit(shard)

    def adopt(self) -> None:
        """Add staged shards to the staged store, in order, up to the first that is missing; upload them."""
        self._folder.adopt()

    def admit_ranks(self) -> None:
        """Share the locks of the staging folder with the ranks of one group; this process keeps the lease."""
        self._folder.admit_ranks()
        lock(self._held, self._remote.url, shared=True)

    def complete(self) -> None:
        """Finish the uploads, complete the staged store, and upload the files that changed and the last manifest."""
        self._uploads.wait()
        if self._is_complete:
            return
        self._fetch_statistics()
        self._folder.complete()
        self._lease.check()
        self._remote.put(STATISTICS, self._folder.path / STATISTICS)
        self._put_metadata()
        self._put_manifest(self._manifest_bytes())
        self._is_complete = True

    def clear_partial(self) -> None:
        """Remove temporary files."""
        self._folder.clear_partial()

    def close(self) -> None:
        """Upload what is committed, as far as possible, and release the store."""
        self._uploads.close()
        self._folder.close()
        if self._is_complete:
            remove_tree(self._folder.path)
        self._lease.release()
        close(self._held)

    def _manifest_bytes(self) -> bytes:
        return (self._folder.path / MANIFEST).read_bytes()

    def _upload_later(self, record: ShardRecord) -> None:
        content = self._manifest_bytes()  # which ends with this record now
        self._uploads.add(lambda: self._upload(record, content))

    def _upload(self, record: ShardRecord, manifest: bytes) -> None:
        """Upload a shard's files, then the manifest that names it; then remove the staged files."""
        self._lease.check()
        for key in record.files:
            self._remote.put(key, self._folder.path / key)
        self._put_manifest(manifest)
        drop_uploaded(self._folder.path, record)

    def _put_manifest(self, content: bytes) -> None:
        try:
            self._version = self._remote.replace(MANIFEST, content, self._version)
        except ChangedObjectError:
            raise StoreBusyError(
                f"another process has written to the store '{self._remote.url}'; let it finish, or stop it, and run "
                "the same command again"
            ) from None

    def _put_metadata(self) -> None:
        for key in metadata_files(self._folder.manifest.header, 0):
            self._remote.put(key, self._folder.path / key)

    def _fetch_statistics(self) -> None:
        """Download the statistics of shards that another machine uploaded, or whose staged files are gone."""
        for record in self._folder.manifest.shards:
            path = self._folder.path / statistics_key(record.shard)
            if not path.exists():
                make_folder(path.parent)
                path.write_bytes(read_object(self._remote, statistics_key(record.shard), record.files))


class Uploads:
    """Run actions in order in one thread; after one fails, the others are skipped."""

    def __init__(self) -> None:
        self._queue: Queue[Callable[[], None] | None] = Queue(SHARDS_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="store-upload", daemon=True)
        self._thread.start()

    def add(self, action: Callable[[], None]) -> None:
        """Add an action; block while `SHARDS_WAITING` others wait. Raises the error of an earlier action."""
        self._check()
        self._queue.put(action)

    def wait(self) -> None:
        """Wait until all actions are done; raise the error of the one that failed."""
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Run the remaining actions and end the thread; errors are left to `wait`."""
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
            except BaseException as error:  # add() and wait() raise it in the writer's thread
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
    """Open a remote store for writing: lock its staging folder, take its lease, and bring the two in line.

    The other parameters are those of `StoreFolder.open`.
    """
    remote = RemoteStore(url)
    staging = staging_folder(url, cache)
    held = lock_staging(url, staging)
    lease = None
    try:
        remote_manifest(remote)  # so that no lease is written where no store may be
        lease = Lease(remote, staging)
        lease.acquire()
        uploaded, version = remote_manifest(remote)
        bring_in_line(staging, uploaded)
        try:
            folder = StoreFolder.open(staging, proposed, resume, any_level, keep_staged, keep_contexts)
        except StoreError as error:
            raise type(error)(str(error).replace(str(staging), str(url))) from None
        return RemoteStoreFolder(folder, remote, lease, held, uploaded, version)
    except BaseException:
        if lease is not None:
            lease.release()
        close(held)
        raise


def remote_manifest(remote: RemoteStore) -> tuple[bytes, Any]:
    """Return the manifest's content, which is checked, and its version; (b"", None) if there is no store yet."""
    try:
        content, version = remote.get_version(MANIFEST)
    except MissingFileError:
        if not remote.is_empty(ignoring=LEASE):
            raise StoreError(f"'{remote.url}' holds other objects and no store; choose another prefix") from None
        return b"", None
    manifest_of(remote.url, content)
    return content, version
