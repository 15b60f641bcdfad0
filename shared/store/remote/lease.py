"""One writer at a time for a store in an object store: a lease, renewed while its owner lives.

The lease is an object that is made, renewed and taken over by conditional puts, so that of several writers one gets
it. It keeps others from starting in vain; what keeps the store whole is that each manifest is put on the condition
that the one before it is still there.
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
    """Who writes: the object's content. Times are seconds since 1970, by the owner's clock."""

    token: str
    host: str
    process: int
    staging: str
    renewed: float
    expires: float


class Lease:
    """The right to write a store, held from `acquire` to `release`.

    A killed writer's lease is taken over at once by one on the same machine with the same staging folder, which is
    locked and so proves that the other is gone, and by any other once it has expired.
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
        """Take the lease; raise `StoreBusyError` if another has it."""
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
        """Raise `StoreBusyError` if another writer took the lease over."""
        if self._lost is not None:
            raise StoreBusyError(
                f"another process took over the store '{self._remote.url}' while this one did not answer; "
                "let it finish, or stop it and start again"
            )

    def release(self) -> None:
        """Give the lease back."""
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
        """Raise `StoreBusyError` unless the owner of a lease is known to be gone."""
        try:
            other = msgspec.json.decode(content, type=Owner)
        except msgspec.DecodeError:
            return
        left = other.expires - time.time()
        same_staging = (other.host, other.staging) == (self._owner.host, self._owner.staging)
        if left > 0 and not same_staging:
            raise StoreBusyError(
                f"another process is writing to the store '{self._remote.url}': {other.process} on {other.host}; wait "
                f"until it ends; if it was killed, start again in {left:.0f} seconds or remove the object '{LEASE}'"
            )
