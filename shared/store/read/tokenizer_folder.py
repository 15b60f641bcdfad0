"""The tokenizer's files in a store's folder, which its metadata lists with a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ...core.errors import StoreError
from ..format.layout import TOKENIZER_FOLDER
from ..local.store_files import StoreFiles


def describe_tokenizer(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the metadata keys that describe these tokenizer files."""
    return {"tokenizer_files": sorted(files), "tokenizer_digest": _digest(files)}


def tokenizer_key(name: str) -> str:
    """Return the path in the store of one of the tokenizer's files."""
    return f"{TOKENIZER_FOLDER}/{name}"


def read_tokenizer_files(files: StoreFiles, metadata: Mapping[str, Any]) -> dict[str, bytes] | None:
    """Return the content of the tokenizer's files by name, or None if the store has none.

    Raises `StoreError` if they are not those that the metadata describes.
    """
    names, digest = metadata.get("tokenizer_files"), metadata.get("tokenizer_digest")
    if not names or not digest:
        return None
    found: dict[str, bytes] = {}
    for name in names:
        if not isinstance(name, str) or any(part in ("", ".", "..") for part in name.split("/")):
            raise StoreError(f"the store '{files.location}' is damaged: {name!r} cannot be a file of its tokenizer")
        content = files.content(tokenizer_key(name))
        if content is None:
            raise StoreError(f"the store '{files.location}' is damaged: '{tokenizer_key(name)}' is missing")
        found[name] = content
    if _digest(found) != digest:
        raise StoreError(
            f"the store '{files.location}' is damaged: the files in '{TOKENIZER_FOLDER}' do not have their digest"
        )
    return found


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.blake2b(content, digest_size=16).hexdigest()}\n".encode())
    return digest.hexdigest()
