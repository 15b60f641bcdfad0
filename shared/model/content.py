"""Digests of the contents of files, to notice that a text, tokenizer or model has changed.

Every byte is read. The digest of a large file is cached and reused as long as the file's inode, size and times are
unchanged; smaller files are read every time. This module does not import PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import MissingFileError
from ..core.location import cache_folder
from ..core.terminal.progress import progress
from .loading.packages import local_model

CACHE_FOLDER = "digests"
MIN_CACHED_BYTES = 1 << 20
"""Smallest file whose digest is cached; smaller files are as fast to read as to look up."""
SETTLED_SECONDS = 2.0
"""Minimum time since a file's last change for its digest to be cached. File systems record times with a resolution of
up to two seconds, so a second change soon after might leave the times unchanged (Git's "racily clean" entries)."""
BLOCK_BYTES = 4 << 20
_MAX_THREADS = 8
_SECONDS_BEFORE_BAR = 2.0
HUB_SECONDS = 5.0

WEIGHT_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "*.index.json", "*.py")
TOKENIZER_FILES = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "encoder.json",
    "merges*",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "chat_template*",
    "additional_chat_templates/*",
)


def describe_files(files: Mapping[str, Path], cache: str | Path | None = None) -> str:
    """Describe files, given by name, by their number, total bytes and a digest of their names and contents.

    Raises `MissingFileError` for a file that cannot be read.
    """
    sizes = {name: _status(path).st_size for name, path in files.items()}
    n_bytes = sum(sizes.values())
    digest = hashlib.blake2b(digest_size=16)
    bar = progress(total=n_bytes, desc="checksum", unit="B", unit_scale=True, delay=_SECONDS_BEFORE_BAR)
    with closing(bar), ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        names = sorted(files)
        digests = pool.map(lambda name: file_digest(files[name], cache, bar.update), names)
        for name, found in zip(names, digests, strict=True):
            digest.update(f"{name}\0{found}\n".encode("utf-8", "surrogateescape"))
    return f"{len(files)} file{'s' * (len(files) != 1)}, {n_bytes:,} bytes, blake2b {digest.hexdigest()}"


def file_digest(path: Path, cache: str | Path | None = None, count: Callable[[int], object] | None = None) -> str:
    """Return the BLAKE2b digest of a file's content, from the cache if the file is large and unchanged."""
    try:
        with path.open("rb") as file:
            before, now = _fields(file), time.time()
            if before[1] < MIN_CACHED_BYTES:
                return _hash(file, count)
            entry = cache_folder(cache) / CACHE_FOLDER / _key(path)
            found = _read_entry(entry, before)
            if found is None:
                found = _hash(file, count)
                if _fields(file) == before and now - max(before[2:]) / 1e9 > SETTLED_SECONDS:
                    _write_entry(entry, before, found)
            elif count is not None:
                count(before[1])
            return found
    except OSError as error:
        raise MissingFileError(f"cannot read '{path}': {error.strerror or error}") from None


def _hash(file: BinaryIO, count: Callable[[int], object] | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while block := file.read(BLOCK_BYTES):
        digest.update(block)  # releases the GIL
        if count is not None:
            count(len(block))
    return digest.hexdigest()


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise MissingFileError(f"cannot read '{path}': {error.strerror or error}") from None


def _fields(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return the fields that change with a file's content: inode, size, mtime and ctime.

    A program cannot set the ctime, so a copy that preserves the original's mtime is noticed too.
    """
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _key(path: Path) -> str:
    return hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()


def _read_entry(entry: Path, fields: tuple[int, ...]) -> str | None:
    try:
        *found, digest = entry.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    return digest if found == [str(field) for field in fields] and len(digest) == 32 else None


def _write_entry(entry: Path, fields: tuple[int, ...], digest: str) -> None:
    """Write a cache entry atomically; a cache that cannot be written is not an error."""
    partial = entry.with_name(f"{entry.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(" ".join([*map(str, fields), digest]), encoding="ascii")
        os.replace(partial, entry)


def matching_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Return the files in a folder that match any of the patterns, by relative path."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in found}


def model_content(model: str, revision: str | None = None, cache: str | Path | None = None) -> dict[str, str | None]:
    """Return what identifies a model's `weights` and `tokenizer`: a digest of the folder's files, or the hub's commit.

    A value is None if it is not known, for example because the model is neither a folder nor reachable on the hub.
    """
    folder = Path(local_model(model))
    if folder.suffix == ".gguf" and folder.is_file():
        return dict.fromkeys(("weights", "tokenizer"), describe_files({folder.name: folder}, cache))
    if folder.is_dir():
        found = {"weights": matching_files(folder, WEIGHT_FILES), "tokenizer": matching_files(folder, TOKENIZER_FILES)}
        return {what: describe_files(files, cache) if files else None for what, files in found.items()}
    commit = hub_commit(model, revision)
    return dict.fromkeys(("weights", "tokenizer"), f"commit {commit}" if commit else None)


def stored_model_content(metadata: Mapping[str, Any]) -> str | None:
    """Return what identifies the model and adapter of a store with this metadata, or None if it is not recorded."""
    harvest = metadata.get("harvest")
    content = harvest.get("content") if isinstance(harvest, Mapping) else None
    found = [content.get(what) for what in ("weights", "adapter")] if isinstance(content, Mapping) else []
    return " with adapter ".join(str(part) for part in found if part) or None


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """Return the commit that a model id and revision currently refer to, from the cache if the hub does not answer."""
    import huggingface_hub

    with suppress(Exception):  # for example: no network, unknown name, no access
        return huggingface_hub.HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS).sha
    with suppress(ValueError):
        found = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None
