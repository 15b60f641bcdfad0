"""Stage one: text to tokens to activations to a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shared.lazy import lazy_exports

if TYPE_CHECKING:
    from .config import HarvestConfig as HarvestConfig
    from .run import harvest as harvest

__getattr__ = lazy_exports(__name__, {"HarvestConfig": ".config", "harvest": ".run"})
