"""Choose the settings that a configuration leaves open: a pure function of what a run is, with reasons.

An architecture's own defaults are published ones, for runs of 10^5 steps. `recipe = "auto"` replaces them by settings
for the run at hand, `recipe = "published"` keeps them. docs/recipes.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from .architectures.gated import GatedConfig
from .architectures.jumprelu import JumpReLUConfig
from .config import SaeConfig

PUBLISHED_WARMUP_STEPS = 1000
LARGEST_BATCH = 4096
ROTATED_KINDS = ("sae", "crosscoder")
"""Kinds of SAEs whose rows are rotated where a run's configuration leaves it open, if they write what they read."""

_SMALLEST_BATCH, _WANTED_STEPS = 256, 700
_WARMUP_SHARE = 1 / 20
# Measured at up to 2,048 latents and 1,400 steps of 2,048 rows; smaller batches at about 190,000 rows. From 70,000
# steps on, the rate is that of the published rule for TopK, 2e-4 / sqrt(d_sae / 2^14); the power of the length is the
# one that leads there.
_PEAK_LR, _PEAK_D_SAE = 8e-3, 2048
_SHORTEST, _LONGEST = 700, 70_000
_LENGTH_POWER = 0.575
_PEAK_BATCH, _BATCH_POWER = 2048, 1 / 3
_LR_SHARES = {
    **dict.fromkeys(
        (
            *("topk", "batch_topk", "matryoshka_batch_topk", "hierarchical_topk", "gated", "random"),
            *("lista_matryoshka", "matching_pursuit"),
        ),
        1.0,
    ),
    **dict.fromkeys(("standard", "transcoder", "skip_transcoder", "crosscoder"), 1.5),
    "jumprelu": 0.7,
}
"""Each architecture's best rate, as a share of TopK's; one that is not here keeps its own."""

# Measured at shares of active latents of d_in from 1/32 to 1/2, at 240 and 960 steps.
_FASTER_DECODERS, _DECODER_LR_SCALE = ("topk", "batch_topk", "jumprelu"), 1.6

# Measured at shares of active latents of d_in from 1/16 to .7, at 240 and 960 steps.
_STEPS_AT_FULL_L0 = 20

# JumpReLU's L0 at first, measured at 240 to 1,953 steps: a dense start finds more features, but takes steps to leave.
_STEPS_PER_TARGET, _MOST_TARGETS, _MOST_OF_WIDTH = 320, 8.0, 0.4

_C = TypeVar("_C", bound=SaeConfig)


class RunFacts(NamedTuple):
    """What an SAE's settings depend on besides its table: the run, its rows, and whether it starts from an SAE."""

    n_steps: int
    batch_size: int
    d_in: int
    starts_from_sae: bool = False


class Setting(NamedTuple):
    """A chosen value, and why."""

    value: Any
    reason: str


class Began(NamedTuple):
    """What a run on disk began with; a run of a release that recorded no settings began with published ones.

    `rotated_kinds` are the kinds of SAEs whose rows it rotates where its configuration leaves it open.
    """

    batch_size: int
    warmup_steps: int
    rotated_kinds: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]] | None

    def settings_for(self, config: SaeConfig) -> dict[str, Setting] | None:
        """Return the settings with which an SAE began, or None for one that was not part of the run."""
        if self.settings is None:
            return {}
        known = self.settings.get(str(config.name))
        if known is None or not all(hasattr(config, key) for key in known):
            return None
        return {key: Setting(value, "as the run began") for key, value in known.items() if getattr(config, key) is None}


_OVER_TEN_STEPS = Setting(0.9, "averages gradients over 10 steps")


def settings_for(config: SaeConfig, facts: RunFacts, recipe: str) -> dict[str, Setting]:
    """Return the settings of an SAE that its table leaves open, by key; none with `recipe = "published"`."""
    if recipe == "published":
        return {}
    chosen = _chosen(config, facts)
    return {
        key: setting for key, setting in chosen.items() if key not in config.unused and getattr(config, key) is None
    }


def batch_size_for(n_tokens: int, rows_per_epoch: int, recipe: str) -> Setting:
    """Return the rows per step of a run whose configuration leaves them open: a power of two."""
    if recipe == "published":
        return Setting(LARGEST_BATCH, "published")
    batch_size = _SMALLEST_BATCH
    while batch_size < LARGEST_BATCH and 2 * batch_size <= min(n_tokens // _WANTED_STEPS, rows_per_epoch):
        batch_size *= 2
    reason = f"at most {n_tokens:,} tokens / {_WANTED_STEPS} steps, {rows_per_epoch:,} rows and {LARGEST_BATCH:,}"
    return Setting(batch_size, f"{reason}, at least {_SMALLEST_BATCH}")


def warmup_for(n_steps: int, recipe: str) -> Setting:
    """Return the steps over which the learning rates of a run grow, where its configuration leaves them open."""
    if recipe == "published":
        return Setting(PUBLISHED_WARMUP_STEPS, "published")
    n = min(PUBLISHED_WARMUP_STEPS, max(1, round(n_steps * _WARMUP_SHARE)))
    return Setting(n, f"a twentieth of {n_steps:,} steps, at most {PUBLISHED_WARMUP_STEPS:,}")


def rotation_for(recipe: str) -> Setting:
    """Return whether rows are rotated for SAEs that write what they read, where a run's configuration leaves it open.

    Transcoders keep the channels: see docs/recipes.md.
    """
    if recipe == "published":
        return Setting("none", "published")
    return Setting("pca", "except for transcoders: Adam scales coordinates one by one, best along principal axes")


def completed(config: _C, settings: Mapping[str, Any]) -> _C:
    """Return a configuration with settings where it leaves them open."""
    return msgspec.structs.replace(config, **{k: v for k, v in settings.items() if getattr(config, k, v) is None})


def _chosen(config: SaeConfig, facts: RunFacts) -> dict[str, Setting]:
    """Return what a table may leave open, whether it does or not."""
    n_steps = facts.n_steps
    share = _LR_SHARES.get(config.architecture)
    if share is None or (isinstance(config, JumpReLUConfig) and config.uses_tanh):
        return {}
    chosen = {"lr": _rate(config, facts, share), "beta2": _beta2(n_steps)}
    if config.wiring.kind == "sae":
        chosen["beta1"] = _beta1(config, facts)
        if config.architecture in _FASTER_DECODERS:
            chosen["decoder_lr_scale"] = Setting(_DECODER_LR_SCALE, "the decoder takes a higher rate than the encoder")
    if isinstance(config, GatedConfig):
        chosen["beta1"] = _OVER_TEN_STEPS
        chosen["decoder_lr_scale"] = Setting(3.0, "lr is the encoder's; decoder rows of unit norm turn slowly")
        chosen["threshold_lr_scale"] = Setting(0.3, "with a decoder of unit norm, biases are small")
    if isinstance(config, JumpReLUConfig):
        if config.target_l0 is None or config.l0_coefficient is not None:
            # Without a controller of L0, the published ones: 0 and 1.
            chosen.pop("beta1", None)
            chosen.pop("decoder_lr_scale", None)
        else:
            chosen = {"beta1": _OVER_TEN_STEPS} | chosen
            chosen |= _first_l0(config, config.target_l0, facts)
    return chosen


def _first_l0(config: JumpReLUConfig, target: float, facts: RunFacts) -> dict[str, Setting]:
    """Return an L0 to start with above the target, in runs that are long enough to come down from it."""
    if config.cross_layer or facts.starts_from_sae or config.initial_threshold is not None:
        return {}
    times = min(1 + facts.n_steps / _STEPS_PER_TARGET, _MOST_TARGETS)
    first = float(f"{min(target * times, _MOST_OF_WIDTH * min(facts.d_in, config.d_sae)):.3g}")
    if first <= target:
        return {}
    most = f"at most {_MOST_TARGETS:g} target_l0, {_MOST_OF_WIDTH:g} d_in and {_MOST_OF_WIDTH:g} d_sae"
    reason = f"target_l0 (1 + {facts.n_steps:,} steps / {_STEPS_PER_TARGET}), {most}"
    return {"initial_l0": Setting(first, reason)}


def _rate(config: SaeConfig, facts: RunFacts, share: float) -> Setting:
    """Return a learning rate that falls with the run's length, with smaller batches and, as published, with width."""
    length, width = min(max(facts.n_steps, _SHORTEST), _LONGEST), max(config.d_sae, _PEAK_D_SAE)
    batch = min(facts.batch_size, _PEAK_BATCH)
    found = _PEAK_LR * share * (_SHORTEST / length) ** _LENGTH_POWER * math.sqrt(_PEAK_D_SAE / width)
    found *= (batch / _PEAK_BATCH) ** _BATCH_POWER
    reason = f"{_PEAK_LR * share:g} ({_SHORTEST} / {length:,} steps)^{_LENGTH_POWER}"
    if width > _PEAK_D_SAE:
        reason += f" sqrt({_PEAK_D_SAE:,} / {width:,} latents)"
    if batch < _PEAK_BATCH:
        reason += f" ({batch:,} / {_PEAK_BATCH:,} rows)^(1/3)"
    return Setting(float(f"{found:.2g}"), reason)


def _beta1(config: SaeConfig, facts: RunFacts) -> Setting:
    """Return the decay rate with which Adam averages gradients: over few steps in short runs, whose rate is high.

    Where many latents of a row are active, they move its reconstruction together, and the average is longer.
    """
    l0 = config.target_l0 if isinstance(config, JumpReLUConfig) else getattr(config, "k", None)
    by_l0 = _STEPS_AT_FULL_L0 * (l0 or 0) / facts.d_in
    memory = min(max(facts.n_steps / 300, by_l0, 2.5), 10.0)
    return Setting(float(f"{1 - 1 / memory:.3g}"), f"averages gradients over {memory:.2g} steps")


def _beta2(n_steps: int) -> Setting:
    """Return the decay rate with which Adam averages squared gradients over a tenth of the run."""
    memory = min(max(n_steps / 10, 20.0), 1000.0)
    return Setting(float(f"{1 - 1 / memory:.3g}"), f"averages squared gradients over {memory:,.0f} steps")
