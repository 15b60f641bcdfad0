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
    from thresher.evaluate.causal.contrast import contrast as contrast
    from thresher.evaluate.causal.steering_curve import steering_curve as steering_curve
    from thresher.evaluate.circuits.run import graph as graph
    from thresher.evaluate.explain.run import explain as explain
    from thresher.evaluate.features.files import FeatureIndex as FeatureIndex
    from thresher.evaluate.notebook.latent_card import show as show
    from thresher.harvest import HarvestConfig as HarvestConfig
    from thresher.harvest import harvest as harvest
    from thresher.shared.core.errors import ThresherError as ThresherError
    from thresher.shared.intervene.edits import Ablate as Ablate
    from thresher.shared.intervene.edits import Add as Add
    from thresher.shared.intervene.edits import Clamp as Clamp
    from thresher.shared.intervene.edits import Fires as Fires
    from thresher.shared.intervene.edits import Orthogonal as Orthogonal
    from thresher.shared.intervene.edits import ProjectionCap as ProjectionCap
    from thresher.shared.intervene.edits import Scale as Scale
    from thresher.shared.intervene.metrics import KLDivergence as KLDivergence
    from thresher.shared.intervene.metrics import LogitDifference as LogitDifference
    from thresher.shared.intervene.metrics import LogProbability as LogProbability
    from thresher.shared.intervene.sae_model import SaeModel as SaeModel
    from thresher.shared.sae import Sae as Sae
    from thresher.shared.store import ActivationStore as ActivationStore
    from thresher.shared.store import ActivationStoreWriter as ActivationStoreWriter
    from thresher.train import ShuffledBatches as ShuffledBatches
    from thresher.train import TrainConfig as TrainConfig
    from thresher.train import train as train

    __version__: str
    """The installed version, such as 0.3.0; `thresher --version` prints it, too."""

_MODULES = {
    "Ablate": "shared.intervene.edits",
    "ActivationStore": "shared.store",
    "ActivationStoreWriter": "shared.store",
    "Add": "shared.intervene.edits",
    "Clamp": "shared.intervene.edits",
    "EvaluateConfig": "evaluate",
    "FeatureIndex": "evaluate.features.files",
    "Fires": "shared.intervene.edits",
    "HarvestConfig": "harvest",
    "KLDivergence": "shared.intervene.metrics",
    "LogProbability": "shared.intervene.metrics",
    "LogitDifference": "shared.intervene.metrics",
    "Orthogonal": "shared.intervene.edits",
    "ProjectionCap": "shared.intervene.edits",
    "Sae": "shared.sae",
    "SaeModel": "shared.intervene.sae_model",
    "Scale": "shared.intervene.edits",
    "ShuffledBatches": "train",
    "ThresherError": "shared.core.errors",
    "TrainConfig": "train",
    "contrast": "evaluate.causal.contrast",
    "explain": "evaluate.explain.run",
    "graph": "evaluate.circuits.run",
    "show": "evaluate.notebook.latent_card",
    "steering_curve": "evaluate.causal.steering_curve",
}
_STAGES = ("harvest", "train", "evaluate")

__all__ = [
    "Ablate",
    "ActivationStore",
    "ActivationStoreWriter",
    "Add",
    "Clamp",
    "EvaluateConfig",
    "FeatureIndex",
    "Fires",
    "HarvestConfig",
    "KLDivergence",
    "LogProbability",
    "LogitDifference",
    "Orthogonal",
    "ProjectionCap",
    "Sae",
    "SaeModel",
    "Scale",
    "ShuffledBatches",
    "ThresherError",
    "TrainConfig",
    "__version__",
    "contrast",
    "evaluate",
    "explain",
    "graph",
    "harvest",
    "show",
    "steering_curve",
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
