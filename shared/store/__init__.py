"""The activation store: Zarr v3 shards, a manifest, exact moments and provenance (docs/FORMAT.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports

if TYPE_CHECKING:
    from .format.moments import Moments as Moments
    from .read.reader import ActivationStore as ActivationStore
    from .write.writer import ActivationStoreWriter as ActivationStoreWriter

__getattr__ = lazy_exports(
    __name__,
    {"ActivationStore": ".read.reader", "ActivationStoreWriter": ".write.writer", "Moments": ".format.moments"},
)
