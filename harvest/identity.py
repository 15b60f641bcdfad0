"""What makes two harvests the same, and whether a store already is the one asked for."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

import msgspec

from ..shared.errors import MissingFileError, StoreError
from ..shared.hook_points import unique_canonical
from ..shared.store.format import MANIFEST
from ..shared.store.location import StoreUrl
from ..shared.store.manifest import Manifest, read_manifest
from .config import HarvestConfig

INCIDENTAL = ("store", "cache", "device", "streaming", "threads", "workers")
SAMPLES = 64
SAMPLE_BYTES = 4096


def identity(config: HarvestConfig) -> dict[str, Any]:
    """Return what determines a store's content: the configuration, and which weights are in a local model folder."""
    keys: dict[str, Any] = {
        key: value for key, value in msgspec.to_builtins(config).items() if key not in INCIDENTAL and value is not None
    }
    if not config.covariance:
        del keys["covariance"]  # as in stores that were begun before there was any
    keys["hook_points"] = unique_canonical(config.hook_points)
    return keys | {"weights": fingerprint(Path(config.model).expanduser())}


def fingerprint(model: Path) -> str | None:
    """Return a hash of a model folder's weight files by name, size and samples; None for a model elsewhere."""
    if not model.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin"), model / "config.json"]):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def is_complete(store: Path | StoreUrl, wanted: dict[str, Any]) -> bool:
    """Tell whether the store is there, whole, and of this very harvest.

    Raises `StoreError` for a store of another harvest, naming the keys that differ.
    """
    manifest = _manifest(store)
    if manifest is None:
        return False
    found = manifest.header.metadata.get("harvest")
    if not isinstance(found, dict):
        raise StoreError(f"the store '{store}' was not written by a harvest; name another path")
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if "weights" in keys and None in (wanted.get("weights"), found.get("weights")):
        keys.remove("weights")  # the model is not at hand to compare
    if keys:
        told = ", ".join(f"{key} ({found.get(key)!r}, now {wanted.get(key)!r})" for key in keys)
        remove = f": rm -r {shlex.quote(str(store))}" if isinstance(store, Path) else ""
        raise StoreError(
            f"the store '{store}' is of another harvest: it differs in {told}; name another store, or remove it{remove}"
        )
    return manifest.completion is not None


def _manifest(store: Path | StoreUrl) -> Manifest | None:
    """Return a store's manifest, or None where none is."""
    if isinstance(store, Path):
        return read_manifest(store) if (store / MANIFEST).is_file() else None
    from ..shared.store.remote import RemoteStore
    from ..shared.store.remote_files import read_remote_manifest

    try:
        return read_remote_manifest(RemoteStore(store))
    except MissingFileError:
        return None
