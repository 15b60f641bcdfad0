"""Locations of stores: a folder, or a bucket and prefix of an object store."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .paths import user_path

SCHEMES = ("s3", "gs", "az")
CACHE_BYTES = 64 << 30
WRITING = "writing"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")
_SIZE = re.compile(r"(\d+)\s*(|[KMGT]i?B?)", re.IGNORECASE)


@dataclass(frozen=True)
class StoreUrl:
    """A store in an object store: `s3://bucket/prefix`, `gs://` or `az://container/prefix`."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        """Return the URL."""
        return f"{self.scheme}://{self.bucket}/{self.prefix}"

    @property
    def name(self) -> str:
        """The last part of the prefix, like the name of a `Path`."""
        return self.prefix.rpartition("/")[2]


def locate(location: str | Path | StoreUrl) -> Path | StoreUrl:
    """Return the location of a store from its name in a configuration; raise `ConfigError` for an unsupported URL."""
    if isinstance(location, StoreUrl):
        return location
    found = None if isinstance(location, Path) else _URL.fullmatch(location)
    if found is None:
        return _possible(user_path(location))
    scheme, rest = found[1].lower(), found[2]
    if scheme not in SCHEMES:
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise ConfigError(f"cannot keep a store at '{location}'; expected a folder, or a URL that begins with {known}")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not bucket or not prefix or any(part in ("", ".", "..") for part in prefix.split("/")):
        raise ConfigError(f"cannot keep a store at '{location}'; expected {scheme}://bucket/prefix")
    return StoreUrl(scheme, bucket, prefix)


def _possible(path: Path) -> Path:
    """Return the path; raise `ConfigError` if no file system accepts it."""
    try:
        os.lstat(path)
    except ValueError:
        raise ConfigError(f"cannot keep a store at {str(path)!r}: no path holds a NUL character") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ConfigError(f"cannot keep a store at '{path}': {error.strerror}") from None
    return path


def cache_folder(folder: str | Path | None = None) -> Path:
    """Return the folder for cached shards: the one given, else `THRESHER_CACHE`, else the user's cache folder."""
    chosen = folder or os.environ.get("THRESHER_CACHE")
    if chosen:
        return user_path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thresher"


def staging_folder(url: StoreUrl, cache: str | Path | None = None) -> Path:
    """Return the folder, within the cache, where shards of a remote store are written before their upload."""
    return cache_folder(cache) / WRITING / owner_of(url)


def owner_of(url: StoreUrl) -> str:
    """Return a short unique name for a store, from its URL and the S3 server that the environment names."""
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return hashlib.blake2b(f"{server} {url}".encode(), digest_size=8).hexdigest()


def cache_limit(n_bytes: int | None = None) -> int:
    """Return the most bytes to cache: the number given, else `THRESHER_CACHE_BYTES` (such as 200GB), else 64 GiB."""
    if n_bytes is not None:
        return n_bytes
    text = os.environ.get("THRESHER_CACHE_BYTES", "").strip()
    if not text:
        return CACHE_BYTES
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(f"THRESHER_CACHE_BYTES is '{text}'; expected a number of bytes, such as 200GB or 64GiB")
    unit = found[2].upper()
    return int(found[1]) * (1024 if "I" in unit else 1000) ** " KMGT".index(unit[:1] or " ")
