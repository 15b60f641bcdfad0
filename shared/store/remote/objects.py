"""The objects of one store in an object store: read by range, written whole, retried when a connection drops.

obstore supports S3, Google Cloud Storage and Azure, and reads endpoint, region and credentials from the standard
environment variables of each (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and so on).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import ConfigError, MissingFileError, StoreError, UnreachableError
from ...core.location import StoreUrl

ATTEMPTS = 5
"""Attempts per request; within each, obstore retries by itself, but does not notice a truncated body."""
FIRST_PAUSE = 0.2
"""Seconds before the second attempt; the pause doubles with each one, up to 10."""
CLIENT_RETRIES = 3
PIECE_BYTES = 8 << 20
"""Bytes per request of a large object: the most that a dropped connection makes us read again."""
PIECES_AT_ONCE = 4

_T = TypeVar("_T")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and so on",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT, the path of a key file",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY and so on",
}
_NO_TOKEN = "token request"
_REFUSED = re.compile(r"status code: 4(?!08|29)\d\d")


class ChangedObjectError(StoreError):
    """An object does not have the expected version: another process wrote it."""


class RemoteStore:
    """A store's objects by their path in the store; safe to use from several threads.

    Raises:
        ConfigError: obstore is not installed, or the URL or the environment is not acceptable.
        UnreachableError: a request failed after all attempts, or was refused; the message says which and why.
    """

    def __init__(self, url: StoreUrl) -> None:
        try:
            import obstore.exceptions
        except ImportError:
            raise ConfigError(
                f"reading or writing '{url}' needs obstore, which is not installed: pip install 'thresher[remote]'"
            ) from None
        self.url = url
        self._obstore = obstore
        self._process = os.getpid()
        errors = obstore.exceptions
        self._final = (
            errors.NotFoundError,
            errors.PermissionDeniedError,
            errors.UnauthenticatedError,
            errors.AlreadyExistsError,
            errors.PreconditionError,
            errors.NotSupportedError,
            errors.InvalidPathError,
        )
        options: dict[str, Any] = {"client_options": {"timeout": "120s", "connect_timeout": "10s"}}
        if url.scheme == "s3":
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            options["client_options"]["allow_http"] = endpoint.startswith("http://")
            if endpoint:
                options["endpoint"] = endpoint
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            options["region"] = region or "us-east-1"
        backoff = {"init_backoff": timedelta(seconds=FIRST_PAUSE), "max_backoff": timedelta(seconds=10)}
        options["retry_config"] = {"max_retries": CLIENT_RETRIES, "backoff": backoff}
        try:
            self._store = obstore.store.from_url(str(url), **options)
        except (errors.BaseError, ValueError) as error:
            raise ConfigError(
                f"cannot connect to '{url}': {_reason(error)}; check the environment ({_CREDENTIALS[url.scheme]})"
            ) from None

    def get(self, key: str, n_bytes: int | None = None) -> bytes:
        """Return a small object.

        Raises:
            MissingFileError: the object does not exist.
            StoreError: its size is not `n_bytes`; it is then not downloaded.
        """

        def attempt() -> bytes:
            result = self._obstore.get(self._store, key)
            size = result.meta["size"]
            if n_bytes is not None and size != n_bytes:
                raise StoreError(
                    f"the store '{self.url}' is damaged: '{key}' has {size} bytes, its manifest says {n_bytes}"
                )
            return bytes(result.bytes())

        return self._again(f"read '{key}'", attempt)

    def get_version(self, key: str) -> tuple[bytes, Any]:
        """Return a small object and its version, for `replace`."""

        def attempt() -> tuple[bytes, Any]:
            result = self._obstore.get(self._store, key)
            meta = result.meta
            return bytes(result.bytes()), {"e_tag": meta["e_tag"], "version": meta["version"]}

        return self._again(f"read '{key}'", attempt)

    def size(self, key: str) -> int:
        """Return an object's size in bytes; raise `MissingFileError` if it does not exist."""
        return self._again(f"read '{key}'", lambda: self._obstore.head(self._store, key)["size"])

    def get_range(self, key: str, start: int, length: int) -> Any:
        """Return `length` bytes of an object, from `start` on, as a buffer."""

        def attempt() -> Any:
            found = self._obstore.get_range(self._store, key, start=start, length=length)
            if len(found) != length:
                raise ConnectionError(f"got {len(found)} of {length} bytes")
            return found

        return self._again(f"read '{key}'", attempt)

    def download(self, key: str, n_bytes: int, file: int, progress: Callable[[int], object] | None = None) -> None:
        """Download an object of known size into an open file; after a dropped connection only the missing pieces."""

        def piece(start: int) -> None:
            length = min(PIECE_BYTES, n_bytes - start)
            os.pwrite(file, self.get_range(key, start, length), start)
            if progress is not None:
                progress(length)

        starts = range(0, n_bytes, PIECE_BYTES)
        if len(starts) == 1:
            piece(0)
            return
        with ThreadPoolExecutor(min(PIECES_AT_ONCE, len(starts) or 1), "store-fetch") as pool:
            try:
                for _ in pool.map(piece, starts):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def put(self, key: str, content: bytes | Path) -> None:
        """Write an object; it replaces an existing one atomically."""
        options: Any = {"chunk_size": PIECE_BYTES, "max_concurrency": PIECES_AT_ONCE}
        self._again(f"write '{key}'", lambda: self._obstore.put(self._store, key, content, **options))

    def replace(self, key: str, content: bytes, version: Any) -> Any:
        """Write a small object if its version is still `version` (None: it does not exist); return the new version.

        Raises:
            ChangedObjectError: it has another version.
        """
        errors = self._obstore.exceptions
        mode: Any = "create" if version is None else {name: part for name, part in version.items() if part is not None}
        try:
            return self._again(
                f"write '{key}'", lambda: self._obstore.put(self._store, key, content, mode=mode, use_multipart=False)
            )
        except UnreachableError as error:
            if not isinstance(error.__cause__, (errors.AlreadyExistsError, errors.PreconditionError)):
                raise
            # An earlier attempt may have succeeded although its answer was lost.
            found, now = self.get_version(key)
            if found == content:
                return now
            raise ChangedObjectError(f"'{self.url}': '{key}' was changed by someone else") from error.__cause__

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        try:
            self._again(f"remove '{key}'", lambda: self._obstore.delete(self._store, key))
        except MissingFileError:
            pass

    def is_empty(self, ignoring: str = "") -> bool:
        """Return whether there is no object below the URL, except possibly `ignoring`."""

        def attempt() -> bool:
            return all(
                meta["path"] == ignoring for page in self._obstore.list(self._store, chunk_size=8) for meta in page
            )

        return self._again("list the objects", attempt)

    def _again(self, what: str, attempt: Callable[[], _T]) -> _T:
        if os.getpid() != self._process:
            raise StoreError(f"'{self.url}' cannot be used in a forked process; start processes by spawn")
        pause = FIRST_PAUSE
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except (self._obstore.exceptions.BaseError, OSError) as error:
                if number == ATTEMPTS or self._is_final(error):
                    raise self._error(what, error, number) from error
            threading.Event().wait(pause)
            pause = min(10.0, 2 * pause)
        raise AssertionError

    def _is_final(self, error: Exception) -> bool:
        """Return whether another attempt is pointless: the server refused the request, and not because it is busy."""
        return isinstance(error, (FileNotFoundError, *self._final)) or bool(_REFUSED.search(str(error)))

    def _error(self, what: str, error: Exception, tries: int) -> UnreachableError | MissingFileError:
        errors = self._obstore.exceptions
        if isinstance(error, (errors.NotFoundError, FileNotFoundError)) or "NoSuchBucket" in str(error):
            return MissingFileError(f"cannot {what} in '{self.url}': there is no such object or bucket")
        denied = isinstance(error, (errors.PermissionDeniedError, errors.UnauthenticatedError))
        if denied or _NO_TOKEN in str(error):
            why = "access was denied" if denied else f"no access token was given ({_reason(error)})"
            return UnreachableError(
                f"cannot {what} in '{self.url}': {why}; check the credentials in the environment "
                f"({_CREDENTIALS[self.url.scheme]})"
            )
        attempts = f" {tries} times" if tries > 1 else ""
        return UnreachableError(
            f"cannot {what} in '{self.url}': failed{attempts} ({_reason(error)}); run the same command again to resume"
        )


def _reason(error: Exception) -> str:
    """Return an error's message in one line of at most 300 characters, without obstore's debug output."""
    text = " ".join(str(error).split()).partition(" Debug source:")[0] or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
