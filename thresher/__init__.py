"""Thresher: train many sparse autoencoders from one pass of a language model.

The public names are here; `harvest`, `train` and `evaluate` are the three stages. Nothing is imported before it is
used, so that `import thresher` takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.evaluate import EvaluateConfig as EvaluateConfig
    from thresher.evaluate import evaluate as evaluate
    from thresher.harvest import HarvestConfig as HarvestConfig
    from thresher.harvest import harvest as harvest
    from thresher.shared.core.errors import ThresherError as ThresherError
    from thresher.shared.sae import Sae as Sae
    from thresher.shared.store import ActivationStore as ActivationStore
    from thresher.shared.store import ActivationStoreWriter as ActivationStoreWriter
    from thresher.train import ShuffledBatches as ShuffledBatches
    from thresher.train import TrainConfig as TrainConfig
    from thresher.train import train as train

    __version__: str

_MODULES = {
    "ActivationStore": "shared.store",
    "ActivationStoreWriter": "shared.store",
    "EvaluateConfig": "evaluate",
    "HarvestConfig": "harvest",
    "Sae": "shared.sae",
    "ShuffledBatches": "train",
    "ThresherError": "shared.core.errors",
    "TrainConfig": "train",
}
_STAGES = ("harvest", "train", "evaluate")

__all__ = [
    "ActivationStore",
    "ActivationStoreWriter",
    "EvaluateConfig",
    "HarvestConfig",
    "Sae",
    "ShuffledBatches",
    "ThresherError",
    "TrainConfig",
    "__version__",
    "evaluate",
    "harvest",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("thresher.shared.core.version").thresher_version()
    if name in _STAGES:
        return import_module(f"thresher.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'thresher' has no attribute '{name}'")
    return getattr(import_module(f"thresher.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
