"""Refuse a run that cannot do what its configuration says, before any work, and print notes on surprising effects."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..shared.core.errors import ConfigError, NonFiniteError, StoreError
from .architectures.base import ROTATED, Architecture

if TYPE_CHECKING:
    from ..shared.store import ActivationStore
    from .architectures.contract import Parameters
    from .config import SaeConfig
    from .step.sae_trainer import Schedule

_LEAST_RELATIVE_VARIANCE = 1e-12
"""If the variance is a smaller fraction of the mean's squared norm, float32 rows vary only by rounding."""


def check_activations(store: ActivationStore, saes: Sequence[SaeConfig]) -> None:
    """Refuse hook points whose training rows an SAE cannot learn from.

    Raises:
        StoreError: a hook point has a single training row, or its rows do not vary.
        NonFiniteError: a hook point's mean or variance is not finite.
    """
    for place in dict.fromkeys(place for sae in saes for place in sae.wiring.hook_points):
        moments = store.moments(place)
        variance, squared_mean = float(moments.total_variance), float((moments.mean**2).sum())
        where = f"the activations at '{place}' in store '{store.path}'"
        advice = "leave out the SAEs that read or reconstruct it, or harvest again"
        if not all(map(math.isfinite, (variance, squared_mean, moments.mean_norm))):
            raise NonFiniteError(f"{where} have a mean or variance that is NaN or infinite; {advice}")
        if moments.count < 2:
            raise StoreError(f"{where} have one training row, expected at least two; harvest more text")
        if variance <= _LEAST_RELATIVE_VARIANCE * squared_mean:
            raise StoreError(f"{where} do not vary: all {moments.count:,} training rows are equal; {advice}")


def check_schedules(architecture: Architecture[Any], schedule: Schedule) -> None:
    """Refuse schedules that are longer than the run: the saved SAE would not be what the configuration says.

    Raises:
        ConfigError: a schedule is longer than the run.
    """
    n_steps = schedule.n_steps
    for key, (given, consequence) in architecture.schedules.items():
        if given is not None and given > n_steps:
            raise ConfigError(
                f"{key} is {given:,}, but the run has {n_steps:,} steps, so {consequence}; "
                f"give at most {n_steps:,}, or train on more tokens"
            )
    every, half = architecture.config.resample_every_tokens, n_steps // 2 * schedule.batch_size
    if every is not None and every > half:
        raise ConfigError(
            f"resample_every_tokens is {every:,}, but latents are resampled in the first half of the run only, "
            f"which has {half:,} tokens; give at most that, or train on more tokens"
        )


def check_frozen(architecture: Architecture[Any], names: Collection[str]) -> None:
    """Refuse to freeze parameters that an SAE does not have, all of them, or directions that resampling would change.

    Raises:
        ConfigError: `freeze` names no parameter of the SAE, or leaves nothing to train.
    """
    unknown = sorted(architecture.frozen - set(names))
    if unknown:
        raise ConfigError(f"freeze names '{unknown[0]}', expected some of: {', '.join(names)}")
    if architecture.frozen == set(names):
        raise ConfigError("freeze names every parameter, so nothing is trained; leave out at least one")
    resampled = sorted(architecture.frozen & {"W_enc", "W_dec"})
    if resampled and architecture.config.resample_every_tokens is not None:
        raise ConfigError(
            f"resample_every_tokens would change {resampled[0]}, which is frozen; leave out one of the two"
        )


def check_rotated(architecture: Architecture[Any], parameters: Parameters) -> None:
    """Refuse to rotate rows for an architecture with parameters that `Architecture.turned` does not know.

    Raises:
        ConfigError: a parameter of another name is not one number per latent.
    """
    if type(architecture).turned is not Architecture.turned:
        return
    for name, tensor in parameters.items():
        if name not in ROTATED and tensor.shape not in ((), (architecture.d_sae,)):
            raise ConfigError(
                f"architecture '{architecture.config.architecture}' has a parameter '{name}' that `turned` does not "
                "rotate; override that method, or train with rotation = 'none'"
            )


def notes_of(architectures: Sequence[Architecture[Any]], schedule: Schedule, rows_per_epoch: int) -> tuple[str, ...]:
    """Return notes on effects of the configuration that a user may not expect."""
    saes = [architecture.config for architecture in architectures]
    n_tokens = schedule.n_steps * schedule.batch_size
    notes = list(_warmup_notes(saes, schedule))
    late = [f"'{sae.name}'" for sae in saes if (sae.dead_after_tokens or 0) >= n_tokens]
    if late:
        notes.append(
            f"dead_after_tokens of {_some(late)} is not less than the run's {n_tokens:,} tokens: "
            "no latent counts as dead, and dead_fraction stays 0"
        )
    if rows_per_epoch < schedule.batch_size:
        notes.append(
            f"the store has {rows_per_epoch:,} training rows, fewer than a batch of {schedule.batch_size:,}: "
            "each batch repeats rows"
        )
    for note in dict.fromkeys(architecture.note for architecture in architectures):
        if note is not None:
            names = [f"'{each.config.name}'" for each in architectures if each.note == note]
            notes.append(note.format(_some(names)))
    return tuple(notes)


def _warmup_notes(saes: Sequence[SaeConfig], schedule: Schedule) -> Iterable[str]:
    for fraction in dict.fromkeys(sae.decay_fraction for sae in saes):
        share = schedule.decay_fraction if fraction is None else fraction
        left = schedule.n_steps - round(schedule.n_steps * share)
        if schedule.warmup_steps > (left or schedule.n_steps):
            effect = f"the learning rate grows over {left:,} steps only" if left else "it does not reach its peak"
            yield (
                f"warmup_steps is {schedule.warmup_steps:,}, but {left:,} of the run's {schedule.n_steps:,} steps come "
                f"before the learning rate falls (decay_fraction {share:g}): {effect}"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
