"""The lease of a store in an object store: one writer at a time, as long as it renews the lease.

The lease is an object that is created, renewed and taken over by conditional puts, so only one of several writers gets
it. It stops a second writer early. What keeps the store consistent is that each manifest is put on the condition that
the previous one is still there.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from ...core.errors import StoreBusyError, UnreachableError
from .objects import ChangedObjectError, RemoteStore

LEASE = ".writer.json"
LEASE_SECONDS = 120.0
RENEW_SECONDS = 30.0


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The lease's holder: the content of the object. Times are seconds since 1970, by the holder's clock."""

    token: str
    host: str
    process: int
    staging: str
    renewed: float
    expires: float


class Lease:
    """The right to write a store, held from `acquire` to `release`.

    After a writer was killed, another one takes over its lease: at once on the same machine with the same staging
    folder, whose lock proves that the first one has exited; elsewhere when the lease has expired.
    """

    def __init__(self, remote: RemoteStore, staging: Path) -> None:
        self._remote = remote
        self._owner = Owner(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            process=os.getpid(),
            staging=str(staging),
            renewed=0.0,
            expires=0.0,
        )
        self._version: Any = None
        self._lost: ChangedObjectError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="store-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease; raise `StoreBusyError` if another writer holds it."""
        try:
            self._renew()
        except ChangedObjectError:
            content, self._version = self._remote.get_version(LEASE)
            self._check_gone(content)
            try:
                self._renew()
            except ChangedObjectError:
                raise StoreBusyError(
                    f"another process has just begun to write to the store '{self._remote.url}'"
                ) from None
        self._thread.start()

    def check(self) -> None:
        """Raise `StoreBusyError` if another writer took over the lease."""
        if self._lost is not None:
            raise StoreBusyError(
                f"another process took over the store '{self._remote.url}' while this one could not renew its lease; "
                "let it finish, or stop it, and run the same command again"
            )

    def release(self) -> None:
        """Give up the lease."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lost is None:
            try:
                self._remote.delete(LEASE)
            except UnreachableError:
                pass  # it expires

    def _renew(self) -> None:
        now = time.time()
        owner = msgspec.structs.replace(self._owner, renewed=now, expires=now + LEASE_SECONDS)
        self._version = self._remote.replace(LEASE, msgspec.json.encode(owner), self._version)

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                self._renew()
            except ChangedObjectError as error:
                self._lost = error
                return
            except UnreachableError:
                continue

    def _check_gone(self, content: bytes) -> None:
        """Raise `StoreBusyError` unless the holder of the lease is known to have exited."""
        try:
            other = msgspec.json.decode(content, type=Owner)
        except msgspec.DecodeError:
            return
        left = other.expires - time.time()
        same_staging = (other.host, other.staging) == (self._owner.host, self._owner.staging)
        if left > 0 and not same_staging:
            raise StoreBusyError(
                f"another process is writing to the store '{self._remote.url}': {other.process} on {other.host}; wait "
                f"until it ends; if it was killed, run again in {left:.0f} seconds or remove the object '{LEASE}'"
            )
