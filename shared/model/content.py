"""Digests of everything that files hold, so that a changed text, tokenizer or model is noticed.

Every byte is read. The digest of a large file is kept in the user's cache and used again as long as the file's inode,
size and times are those it was computed for; smaller files are read each time. Needs no PyTorch.
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
from ..core.progress import progress

KEPT_FOLDER = "digests"
KEPT_BYTES = 1 << 20
"""Size from which a file's digest is kept; smaller files are as quick to read as to look up."""
SETTLED_SECONDS = 2.0
"""Age that a file's last change must have for its digest to be kept: file systems count time in ticks of up to two
seconds, and a second change within one tick would leave the same times (Git calls such an entry racily clean)."""
BLOCK_BYTES = 4 << 20
MAX_THREADS = 8
SECONDS_BEFORE_BAR = 2.0
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
    """Return the number, bytes and digest of files, each under the name it counts by.

    Raises `MissingFileError` for a file that cannot be read.
    """
    sizes = {name: _status(path).st_size for name, path in files.items()}
    n_bytes = sum(sizes.values())
    digest = hashlib.blake2b(digest_size=16)
    bar = progress(total=n_bytes, desc="checksum", unit="B", unit_scale=True, delay=SECONDS_BEFORE_BAR)
    with closing(bar), ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        names = sorted(files)
        digests = pool.map(lambda name: file_digest(files[name], cache, bar.update), names)
        for name, found in zip(names, digests, strict=True):
            digest.update(f"{name}\0{found}\n".encode("utf-8", "surrogateescape"))
    return f"{len(files)} file{'s' * (len(files) != 1)}, {n_bytes:,} bytes, blake2b {digest.hexdigest()}"


def file_digest(path: Path, cache: str | Path | None = None, count: Callable[[int], object] | None = None) -> str:
    """Return the BLAKE2b digest of a file's whole content, computed or, for an unchanged large file, kept."""
    try:
        with path.open("rb") as file:
            before, now = _fields(file), time.time()
            if before[1] < KEPT_BYTES:
                return _hash(file, count)
            kept = cache_folder(cache) / KEPT_FOLDER / _key(path)
            found = _read_kept(kept, before)
            if found is None:
                found = _hash(file, count)
                if _fields(file) == before and now - max(before[2:]) / 1e9 > SETTLED_SECONDS:
                    _keep(kept, before, found)
            elif count is not None:
                count(before[1])
            return found
    except OSError as error:
        raise MissingFileError(f"cannot read '{path}': {error.strerror or error}") from None


def _hash(file: BinaryIO, count: Callable[[int], object] | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while block := file.read(BLOCK_BYTES):
        digest.update(block)  # releases the interpreter's lock
        if count is not None:
            count(len(block))
    return digest.hexdigest()


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise MissingFileError(f"cannot read '{path}': {error.strerror or error}") from None


def _fields(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return what changes with a file's content: inode, size, and the times of change of content and of inode.

    The last cannot be set by a program, so a copy that keeps the time of the original is noticed too.
    """
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _key(path: Path) -> str:
    return hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()


def _read_kept(kept: Path, fields: tuple[int, ...]) -> str | None:
    try:
        *found, digest = kept.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    return digest if found == [str(field) for field in fields] and len(digest) == 32 else None


def _keep(kept: Path, fields: tuple[int, ...], digest: str) -> None:
    """Write an entry at once or not at all; a cache that cannot be written is no error."""
    partial = kept.with_name(f"{kept.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(" ".join([*map(str, fields), digest]), encoding="ascii")
        os.replace(partial, kept)


def matching(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Return the files of a folder that match any of the patterns, by their path within it."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in found}


def model_content(model: str, revision: str | None = None, cache: str | Path | None = None) -> dict[str, str | None]:
    """Return what identifies a model's `weights` and `tokenizer`: the digest of a folder's files, or the hub's commit.

    None stands for what is not known: a model that is neither here nor to be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        found = {"weights": matching(folder, WEIGHT_FILES), "tokenizer": matching(folder, TOKENIZER_FILES)}
        return {what: describe_files(files, cache) if files else None for what, files in found.items()}
    commit = hub_commit(model, revision)
    return dict.fromkeys(("weights", "tokenizer"), f"commit {commit}" if commit else None)


def stored_model_content(metadata: Mapping[str, Any]) -> str | None:
    """Return what identifies the model, and its adapter, of a store with this metadata; None where it does not say."""
    harvest = metadata.get("harvest")
    content = harvest.get("content") if isinstance(harvest, Mapping) else None
    found = [content.get(what) for what in ("weights", "adapter")] if isinstance(content, Mapping) else []
    return " with adapter ".join(str(part) for part in found if part) or None


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """Return the commit that a model id and revision stand for now, from the cache if the hub does not answer."""
    import huggingface_hub

    with suppress(Exception):  # of many kinds: no network, no such name, no access
        return huggingface_hub.HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS).sha
    with suppress(ValueError):
        found = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None
