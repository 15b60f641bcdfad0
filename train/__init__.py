"""Stage two: train many SAEs on shuffled batches of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shared.core.lazy import lazy_exports, make_callable

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .run import train as train
    from .stream.batches import ShuffledBatches as ShuffledBatches

__getattr__ = lazy_exports(__name__, {"ShuffledBatches": ".stream.batches", "TrainConfig": ".config", "train": ".run"})
make_callable(__name__, "train")
