"""Stage two: a store to shuffled batches to many SAEs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shared.lazy import lazy_exports

if TYPE_CHECKING:
    from .batches import ShuffledBatches as ShuffledBatches
    from .config import TrainConfig as TrainConfig
    from .run import train as train

__getattr__ = lazy_exports(__name__, {"ShuffledBatches": ".batches", "TrainConfig": ".config", "train": ".run"})
