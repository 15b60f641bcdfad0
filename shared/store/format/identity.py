"""The identity of a store's content, independent of its path: a digest of its layout and its shards' checksums."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from .manifest import Manifest

_NOT_CONTENT = ("metadata", "n_contexts")


class StoreIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A digest of the first `shards` shards of a store, which hold `contexts` contexts."""

    digest: str
    shards: int
    contexts: int

    @classmethod
    def of(cls, manifest: Manifest, n_shards: int | None = None) -> StoreIdentity:
        """Return the identity of a store's committed shards, or of the first `n_shards` of them.

        Paths and metadata do not count: a store that was moved has the same identity.
        """
        header: dict[str, Any] = msgspec.to_builtins(manifest.header)
        layout = {key: value for key, value in sorted(header.items()) if key not in _NOT_CONTENT}
        shards = manifest.shards[:n_shards]
        hashed = hashlib.sha256(msgspec.json.encode([layout, shards], order="sorted"))
        full = max(0, len(shards) - 1) * manifest.header.contexts_per_shard
        return cls(hashed.hexdigest()[:32], len(shards), full + shards[-1].contexts if shards else 0)
