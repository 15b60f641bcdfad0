"""The architectures that can be trained, by name, each with its configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec
import msgspec.inspect

from ...shared.core.config import check_keys, to_config
from ...shared.core.config_values import accepted_types, check_value
from ...shared.core.errors import ConfigError
from ..config import SaeConfig
from .base import Architecture

Make = TypeVar("Make", bound=Callable[..., Architecture[Any]])


class Registered(NamedTuple):
    """An architecture's configuration class, and its class or a function that chooses one."""

    config: type[SaeConfig]
    make: Callable[..., Architecture[Any]]

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of a `[[sae]]` table that the architecture uses."""
        return tuple(key for key in self.config.__struct_fields__ if key not in self.config.unused)

    @property
    def required(self) -> tuple[str, ...]:
        """Return the keys that this architecture requires, besides those that all require."""
        fields = msgspec.structs.fields(self.config)
        return tuple(f.name for f in fields if f.required and f.name not in SaeConfig.__struct_fields__)


ARCHITECTURES: dict[str, Registered] = {}
CROSS_LAYER: dict[str, Callable[..., Architecture[Any]]] = {}
"""The classes of cross-layer transcoders, by the architecture's name."""


def register(config: type[SaeConfig], cross_layer: bool = False) -> Callable[[Make], Make]:
    """Register an architecture under the name that its configuration's `architecture` has by default.

    The decorated class, or function, is called with a configuration, d_in and d_out. With `cross_layer` it is called
    for the architecture's tables with `cross_layer = true`.

    Raises:
        ConfigError: another module has registered that name.
    """
    name = next(field.default for field in msgspec.structs.fields(config) if field.name == "architecture")

    def keep(make: Make) -> Make:
        if cross_layer:
            CROSS_LAYER[name] = make
            return make
        other = ARCHITECTURES.get(name)
        if other is not None and other.config.__module__ != config.__module__:
            raise ConfigError(
                f"two architectures are named '{name}', in {other.config.__module__} and {config.__module__}; "
                "rename one of them"
            )
        ARCHITECTURES[name] = Registered(config, make)
        return make

    return keep


def architectures_using(key: str) -> list[str]:
    """Return the names of the architectures that use a key of a `[[sae]]` table."""
    return [name for name, registered in ARCHITECTURES.items() if key in registered.keys]


def all_fields() -> dict[str, msgspec.structs.FieldInfo]:
    """Return the keys of all architectures' `[[sae]]` tables."""
    configs = [registered.config for registered in ARCHITECTURES.values()]
    return {field.name: field for config in configs for field in msgspec.structs.fields(config)}


def takes(key: str, kind: type[msgspec.inspect.Type]) -> bool:
    """Return whether a key of a `[[sae]]` table takes values of a type, such as `msgspec.inspect.IntType`."""
    field = all_fields().get(key)
    return field is not None and any(
        isinstance(part, kind) for part in accepted_types(msgspec.inspect.type_info(field.type))
    )


def find_architecture(name: str) -> Registered:
    """Return a registered architecture.

    Raises:
        ConfigError: none has that name.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(ARCHITECTURES)}"
        raise ConfigError(f"no architecture '{name}'; {advice}")
    return ARCHITECTURES[name]


def to_sae_config(table: Mapping[str, Any], where: str = "[[sae]]") -> SaeConfig:
    """Return the configuration that a `[[sae]]` table without grids gives; `where` names it in error messages.

    Keys that are None count as not given.

    Raises:
        ConfigError: there is no such architecture; a key is unknown, missing, or not used by the architecture; or a
            value is of another type or out of bounds.
    """
    table = {key: value for key, value in table.items() if value is not None}
    check_keys(table, all_fields(), where)
    name = check_value(f"{where}: architecture", table.get("architecture", "topk"), str)
    try:
        registered = find_architecture(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for key in table:
        if key not in registered.keys:
            raise ConfigError(
                f"{where}: '{key}' is given, but architecture '{name}' does not use it "
                f"(used by: {', '.join(architectures_using(key))}); leave it out"
            )
    for key in registered.required:
        if key not in table:
            raise ConfigError(f"{where}: architecture '{name}' needs '{key}'; give it in the [[sae]] table")
    return to_config(registered.config, table, where)


def make_config(**keys: Any) -> SaeConfig:
    """Return the configuration that keys of a `[[sae]]` table give, as `to_sae_config` does."""
    return to_sae_config(keys)


def make_architecture(config: SaeConfig, d_in: int, d_out: int | None = None) -> Architecture[Any]:
    """Return the architecture of a configuration, for rows of width `d_in`; `d_out` is `d_in` if not given.

    Raises:
        ConfigError: it cannot read and write what the configuration says.
    """
    make = find_architecture(config.architecture).make
    if config.cross_layer:
        if config.architecture not in CROSS_LAYER:
            raise ConfigError(
                f"architecture '{config.architecture}' has no cross-layer transcoder; with cross_layer = true give one "
                f"of: {', '.join(CROSS_LAYER)}"
            )
        make = CROSS_LAYER[config.architecture]
    architecture = make(config, d_in, d_out)
    wiring, kind = config.wiring, architecture.kind_of_wiring
    if kind not in (None, wiring.kind):
        wanted = {"sae": "hook_point", "transcoder": "reads and writes", "crosscoder": "at least two hook_points"}
        raise ConfigError(
            f"architecture '{config.architecture}' cannot write {', '.join(wiring.writes)} from "
            f"{', '.join(wiring.reads)}; give it {wanted[str(kind)]}"
        )
    return architecture
