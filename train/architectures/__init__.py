"""The architectures that can be trained, by name."""

from __future__ import annotations

import difflib

from ...shared.core.errors import ConfigError
from ..config import SaeConfig
from .base import COMMON_OPTIONS, Architecture
from .batch_topk import BatchTopK
from .crosscoder import Crosscoder
from .gated import Gated
from .hierarchical_topk import HierarchicalTopK
from .jumprelu import JumpReLU, TanhJumpReLU
from .matryoshka import MatryoshkaBatchTopK
from .standard import PAnnealed, Standard
from .topk import AnnealedTopK, TopK
from .transcoder import SkipTranscoder, Transcoder

_KNOWN = (
    TopK,
    BatchTopK,
    MatryoshkaBatchTopK,
    HierarchicalTopK,
    Standard,
    Gated,
    JumpReLU,
    Transcoder,
    SkipTranscoder,
    Crosscoder,
)
ARCHITECTURES: dict[str, type[Architecture]] = {cls.name: cls for cls in _KNOWN}


def architectures_using(key: str) -> list[str]:
    """Return the names of the architectures that use a key of a `[[sae]]` table."""
    return [name for name, cls in ARCHITECTURES.items() if key in (*COMMON_OPTIONS, *cls.required, *cls.options)]


def make_architecture(config: SaeConfig, d_in: int, d_out: int | None = None) -> Architecture:
    """Return the architecture that a configuration names; `d_out` is d_in where not given.

    Raises:
        ConfigError: there is none of that name, or its hyperparameters do not fit.
    """
    if config.architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(config.architecture, ARCHITECTURES, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(ARCHITECTURES)}"
        raise ConfigError(f"no architecture '{config.architecture}'; {advice}")
    _check_options(config)
    cls = ARCHITECTURES[config.architecture]
    if config.wiring.kind != cls.kind_of_wiring:
        wanted = {"sae": "hook_point", "transcoder": "reads and writes", "crosscoder": "at least two hook_points"}
        raise ConfigError(
            f"architecture '{config.architecture}' cannot write {', '.join(config.wiring.writes)} from "
            f"{', '.join(config.wiring.reads)}; give it {wanted[cls.kind_of_wiring]}"
        )
    if AnnealedTopK.is_asked_for(config):
        cls = AnnealedTopK
    elif config.p_final is not None:
        cls = PAnnealed
    elif TanhJumpReLU.is_asked_for(config):
        cls = TanhJumpReLU
    architecture = cls(config, d_in)
    architecture.d_out = d_out or d_in
    return architecture


def _check_options(config: SaeConfig) -> None:
    """Raise `ConfigError` for an option that has no effect, or none without another."""
    for key in config.__struct_fields__:
        if getattr(config, key) is not None and config.architecture not in (users := architectures_using(key)):
            raise ConfigError(
                f"'{key}' is given, but architecture '{config.architecture}' does not use it "
                f"(used by: {', '.join(users)}); leave it out"
            )
    if (config.p_final is None) != (config.p_anneal_steps is None):
        raise ConfigError("p-annealing needs both 'p_final' and 'p_anneal_steps'; give both or neither")
    tanh = TanhJumpReLU.is_asked_for(config)
    for key in ("tanh_scale", "pre_act_coefficient"):
        if getattr(config, key) is not None and not tanh:
            raise ConfigError(f"'{key}' is given, but only a jumprelu SAE with sparsity_loss = 'tanh' uses it")
    if tanh and config.target_l0 is not None:
        raise ConfigError("'target_l0' is for sparsity_loss = 'l0', and this SAE's is 'tanh'; leave one out")
    if config.initial_l0 is not None and (tanh or config.initial_threshold is not None):
        other = "sparsity_loss = 'tanh'" if tanh else "'initial_threshold'"
        raise ConfigError(f"{other} starts the thresholds otherwise than 'initial_l0' does; leave one out")
    if config.unit_norm_decoder is not None and tanh:
        raise ConfigError("sparsity_loss = 'tanh' penalises decoder norms; leave unit_norm_decoder out")
