"""Random search in a `[[sae]]` table: values drawn from distributions, the same in every run."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from msgspec.inspect import IntType

from ...shared.core.config import check_keys
from ...shared.core.errors import ConfigError
from ..architectures.registry import takes

_KINDS = ("uniform", "log_uniform", "choice")
_DIGITS = 4


def draws_of(table: Mapping[str, Any], where: str) -> dict[str, tuple[str, list[Any]]]:
    """Return the keys of a table that are drawn, each with the name of its distribution and its bounds or choices.

    Raises:
        ConfigError: a distribution is invalid, or `samples` is missing or given without a distribution.
    """
    draws = {}
    for key, value in table.items():
        if not isinstance(value, Mapping):
            continue
        check_keys(value, _KINDS, f"{where}: {key}")
        if len(value) != 1:
            raise ConfigError(f"{where}: '{key}' is {dict(value)}, expected one of {', '.join(_KINDS)}")
        ((kind, parts),) = value.items()
        draws[key] = (kind, _checked(kind, parts, f"{where}: '{key}'"))
    samples = table.get("samples")
    if draws and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise ConfigError(f"{where}: '{next(iter(draws))}' is drawn at random; give samples = N, got {samples!r}")
    if "samples" in table and not draws:
        raise ConfigError(
            f"{where}: 'samples' is given, but no value is drawn, as lr = {{ log_uniform = [1e-4, 1e-2] }}"
        )
    seed = table.get("sample_seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or ("sample_seed" in table and not draws):
        raise ConfigError(f"{where}: sample_seed is {seed!r}, expected an integer, because values are drawn at random")
    return draws


def sample_tables(table: Mapping[str, Any], draws: Mapping[str, tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """Return `samples` tables with values in place of distributions: a pure function of `sample_seed` and the table.

    Each key has its own generator, so that another key or more samples do not change the existing draws.
    """
    rest = {key: value for key, value in table.items() if key not in ("samples", "sample_seed")}
    generators = {key: random.Random(f"{table.get('sample_seed', 0)}:{key}") for key in draws}
    return [
        rest | {key: _draw(kind, parts, takes(key, IntType), generators[key]) for key, (kind, parts) in draws.items()}
        for _ in range(table["samples"])
    ]


def _checked(kind: str, parts: Any, what: str) -> list[Any]:
    if not isinstance(parts, list) or not parts:
        raise ConfigError(f"{what}: {kind} is {parts!r}, expected a list")
    if kind == "choice":
        return parts
    numbers = [part for part in parts if isinstance(part, (int, float)) and not isinstance(part, bool)]
    if len(parts) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ConfigError(f"{what}: {kind} is {parts}, expected [lowest, highest]")
    if kind == "log_uniform" and numbers[0] <= 0:
        raise ConfigError(f"{what}: log_uniform is {parts}, expected bounds above 0")
    return parts


def _draw(kind: str, parts: list[Any], whole: bool, generator: random.Random) -> Any:
    if kind == "choice":
        return generator.choice(parts)
    low, high = parts
    share = generator.random()
    drawn = low + (high - low) * share if kind == "uniform" else math.exp(math.log(low) + math.log(high / low) * share)
    # Few digits, so that a readable name or configuration gives exactly the value that was used.
    return round(drawn) if whole else float(f"{drawn:.{_DIGITS}g}")
