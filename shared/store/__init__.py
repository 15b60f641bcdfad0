"""The activation store: Zarr v3 shards, a manifest, exact moments and provenance (docs/FORMAT.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .moments import Moments as Moments
    from .reader import ActivationStore as ActivationStore
    from .writer import ActivationStoreWriter as ActivationStoreWriter

__getattr__ = lazy_exports(
    __name__, {"ActivationStore": ".reader", "ActivationStoreWriter": ".writer", "Moments": ".moments"}
)
