"""Expand `[[sae]]` tables into one configuration per SAE: lists are grids, distributions are drawn."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec.inspect import VarTupleType

from ...shared.core.errors import ConfigError
from ...shared.model.hook_points import canonical_hook_point
from ..architectures.registry import takes, to_sae_config
from ..config import HookPoints, SaeConfig
from .random_search import draws_of, sample_tables

_RESERVED = {"config.toml", "checkpoint.json", "checkpoint.previous.json"}
"""Files of a run that lie beside the SAEs' folders."""

_MOST_BYTES = 200
"""File systems allow 255; the files of an evaluation append to the SAE's name."""

_SEVERAL = ("reads", "hook_points")
"""Keys that name what is read, in place of `hook_point`; `hook_point` is then the first."""
_LABELS = {"l1_coefficient": "l1-", "architecture": "", "hook_point": "", "d_sae": ""}


def expand_sweep(tables: Sequence[Mapping[str, Any] | SaeConfig]) -> list[SaeConfig]:
    """Return one configuration per SAE, each with a unique name.

    A list is a grid over its members; several lists give all combinations, the last list varying fastest. With
    `samples = N`, a value such as `{ log_uniform = [1e-4, 1e-2] }` is drawn N times, and names end with the number of
    the sample. A name may contain other keys in braces; keys that vary and are missing from it are appended.

    Raises:
        ConfigError: a table is invalid, or two SAEs would have the same name.
    """
    saes = []
    for index, table in enumerate(tables):
        where = f"sae[{index}]"
        if isinstance(table, SaeConfig):
            table = {key: value for key, value in msgspec.to_builtins(table).items() if value is not None}
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: expected a [[sae]] table, got {table!r}")
        several = _key_of_reads(table, where)
        has_both = several is not None and "hook_point" in table
        if several is not None and not has_both:
            table = {"hook_point": f"the first of {several}", **table}
        drawn = draws_of(table, where)
        samples = sample_tables(table, drawn) if drawn else [table]
        for number, sample in enumerate(samples):
            varying = [key for key, value in sample.items() if _is_grid(key, value)]
            for key in varying:
                if not sample[key]:
                    raise ConfigError(f"{where}: '{key}' is an empty list; give at least one value")
            for values in itertools.product(*(sample[key] for key in varying)):
                config = to_sae_config({**sample, **dict(zip(varying, values, strict=True))}, where)
                config, given = _canonical(config, where), config.hook_point
                if has_both and canonical_hook_point(given) != config.hook_point:
                    raise ConfigError(
                        f"{where}: hook_point is '{given}', but the first of {several} is '{config.hook_point}'; "
                        "leave hook_point out"
                    )
                name = _name(config, varying, where, f"-{number}" if drawn else "")
                saes.append(msgspec.structs.replace(config, name=name))
    check_names([str(sae.name) for sae in saes])
    return saes


def check_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` unless each name can be a folder on any file system and no two names share a folder."""
    folders: dict[str, str] = {}
    for name in names:
        if not name or name.startswith(".") or name.casefold() in _RESERVED:
            raise ConfigError(
                f"an SAE is named '{name}', which cannot be its folder in the output: expected a name that is not "
                f"empty, does not begin with '.', and is not one of {', '.join(sorted(_RESERVED))}"
            )
        n_bytes = len(name.encode())
        if n_bytes > _MOST_BYTES:
            raise ConfigError(
                f"the SAE name '{name[:40]}...' has {n_bytes} bytes, expected at most {_MOST_BYTES}; "
                "give a shorter 'name'"
            )
        other = folders.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ConfigError(
                f"the SAEs '{other}' and '{name}' would share a folder where file names ignore case; "
                "give the [[sae]] tables different names"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"two SAEs are named '{twice[0]}'; give the [[sae]] tables different names")


def _key_of_reads(table: Mapping[str, Any], where: str) -> str | None:
    """Return which key says what is read, if it is not `hook_point`.

    Raises:
        ConfigError: keys contradict each other.
    """
    given = [key for key in (*_SEVERAL, "writes", "hook_point_out") if table.get(key) is not None]
    if "reads" in given and "writes" not in given:
        raise ConfigError(
            f"{where}: 'reads' is given without 'writes'; give both, or hook_point or hook_points for an SAE that "
            "writes what it reads"
        )
    if "writes" in given and "reads" not in given:
        raise ConfigError(f"{where}: 'writes' is given without 'reads'; name what is read with 'reads'")
    for other in ("hook_points", "hook_point_out"):
        if "writes" in given and other in given:
            raise ConfigError(f"{where}: '{other}' is given together with 'reads' and 'writes'; leave '{other}' out")
    return next((key for key in _SEVERAL if key in given), None)


def _canonical(config: SaeConfig, where: str) -> SaeConfig:
    def names(given: HookPoints | None) -> tuple[str, ...] | None:
        several = (given,) if isinstance(given, str) else given
        return None if several is None else tuple(map(canonical_hook_point, several))

    out = config.hook_point_out
    config = msgspec.structs.replace(
        config,
        hook_point_out=canonical_hook_point(out) if out else None,
        hook_points=names(config.hook_points),
        reads=names(config.reads),
        writes=names(config.writes),
        hook_point=canonical_hook_point(config.hook_point),
    )
    try:
        return msgspec.structs.replace(config, hook_point=config.wiring.reads[0])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _is_grid(key: str, value: Any) -> bool:
    """Return whether a value stands for several: a list, or a list of lists where the key takes lists."""
    return isinstance(value, list) and (not takes(key, VarTupleType) or bool(value and isinstance(value[0], list)))


def _name(config: SaeConfig, varying: Sequence[str], where: str, ending: str) -> str:
    keys = {key: value for key, value in msgspec.structs.asdict(config).items() if value is not None}
    keys |= {key: "+".join(keys[key]) for key in ("reads", "writes") if key in keys}
    template = config.name
    if template is None:
        template = "{architecture}-{reads}-{writes}-{d_sae}" if config.writes else "{architecture}-{hook_point}-{d_sae}"
        if config.cross_layer:
            template = f"{{architecture}}-cross_layer-{len(config.wiring.reads)}x{{d_sae}}"
        if config.skip and "skip" not in varying:
            template += "-skip"
        template += config.name_ending
    for key in varying:
        if f"{{{key}}}" not in template and key != "name":
            template += f"-{_LABELS.get(key, key)}{{{key}}}"
    try:
        name = template.format(**keys)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ConfigError(f"{where}: name '{template}' uses an unknown key; known keys: {', '.join(keys)}") from None
    return re.sub(r"[^\w.+-]+", "_", name + ending)
