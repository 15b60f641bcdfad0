"""The help of `thresher train`: the run's keys, the keys of every `[[sae]]` table, and the architectures."""

from __future__ import annotations

from ..shared.core.config import help_text
from .architectures.registry import ARCHITECTURES, find_architecture
from .config import SaeConfig


def help_on_saes() -> str:
    """Return the keys that all `[[sae]]` tables have, and a line for each architecture."""
    shared = [key for key in SaeConfig.__struct_fields__ if key not in SaeConfig.unused]
    lines = ["keys of every [[sae]] table, in the config file:", "", help_text(SaeConfig, shared, dashes=""), ""]
    lines += ["architectures, with the keys that they need; `thresher train --help NAME` lists all keys of one:", ""]
    for name, registered in ARCHITECTURES.items():
        needed = ", ".join(registered.required)
        lines.append(f"  {name:<26} {_summary(registered.config)}" + (f" Needs {needed}." if needed else ""))
    return "\n".join(lines)


def help_on_architecture(name: str) -> str:
    """Return the keys that one architecture adds to those of every `[[sae]]` table.

    Raises:
        ConfigError: there is no such architecture.
    """
    registered = find_architecture(name)
    own = [key for key in registered.keys if key not in SaeConfig.__struct_fields__ or key in SaeConfig.unused]
    return (
        f'architecture = "{name}"\n\n{_summary(registered.config)}\n\n'
        f"keys of its [[sae]] tables, besides those of every table that `thresher train --help` lists:\n\n"
        f"{help_text(registered.config, own, dashes='')}"
    )


def _summary(config: type[SaeConfig]) -> str:
    """Return the first line of a configuration's docstring."""
    return (config.__doc__ or "").strip().split("\n")[0]
