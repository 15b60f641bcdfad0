"""The architectures that can be trained, by name."""

from __future__ import annotations

import difflib

from ...shared.errors import ConfigError
from ..config import SaeConfig
from .base import Architecture
from .batch_topk import BatchTopK
from .gated import Gated
from .hierarchical_topk import HierarchicalTopK
from .jumprelu import JumpReLU
from .matryoshka import MatryoshkaBatchTopK
from .standard import Standard
from .topk import TopK

_KNOWN = (TopK, BatchTopK, MatryoshkaBatchTopK, HierarchicalTopK, Standard, Gated, JumpReLU)
ARCHITECTURES: dict[str, type[Architecture]] = {cls.name: cls for cls in _KNOWN}


def make_architecture(config: SaeConfig, d_in: int) -> Architecture:
    """Return the architecture that a configuration names.

    Raises:
        ConfigError: there is none of that name, or its hyperparameters do not fit.
    """
    if config.architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(config.architecture, ARCHITECTURES, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(ARCHITECTURES)}"
        raise ConfigError(f"no architecture '{config.architecture}'; {advice}")
    return ARCHITECTURES[config.architecture](config, d_in)
