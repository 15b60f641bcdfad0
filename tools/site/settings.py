"""Pages about settings, from the classes that `--help` reads: the keys of configurations, and the commands."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from io import StringIO
from typing import Any

import msgspec
import msgspec.inspect

import thresher
from thresher.shared.core.config import Config
from thresher.shared.core.config_values import expected
from thresher.train.architectures.registry import ARCHITECTURES
from thresher.train.config import SaeConfig

_FIRST = ["demo", "harvest", "train", "evaluate", "explain", "microscope"]


def keys_table(name: str) -> str:
    """Return the table of the keys of a public configuration."""
    return _keys(getattr(thresher, name))


def commands_page() -> str:
    """Return the page that lists every command with its usage and keys."""
    entries = {entry.name: entry.load() for entry in entry_points(group="thresher.commands")}
    names = [name for name in _FIRST if name in entries] + sorted(entries.keys() - set(_FIRST))
    parts = [
        "# Commands\n\n`thresher COMMAND --help` prints the same. Values of the command line replace those of the file."
    ]
    for name in names:
        command = entries[name]
        parts.append(f"## `thresher {name}` {{ #{name} }}\n\n{command.SUMMARY}")
        config = getattr(command, "CONFIG", None)
        if config is None:
            parts.append(_block(_help(command.main)))
        else:
            parts += [_block(f"thresher {name} [CONFIG.toml] [--key value ...]"), _keys(config)]
        if config is thresher.TrainConfig:
            parts += _architectures()
    return "\n\n".join(parts) + "\n"


def _architectures() -> list[str]:
    """Return the parts on `[[sae]]` tables: the keys of all, and those of each architecture."""
    shared = [key for key in SaeConfig.__struct_fields__ if key not in SaeConfig.unused]
    parts = ["### Every `[[sae]]` table { #sae-tables }", _keys(SaeConfig, shared)]
    for name, registered in ARCHITECTURES.items():
        own = [key for key in registered.keys if key not in SaeConfig.__struct_fields__ or key in SaeConfig.unused]
        summary = (registered.config.__doc__ or "").strip().partition("\n")[0]
        parts += [f'### `architecture = "{name}"` {{ #architecture-{name} }}', _text(summary)]
        parts += [_keys(registered.config, own)] if own else []
    return parts


def _keys(config: type[Config], only: Collection[str] | None = None) -> str:
    """Return a table of keys: what each takes, its default, and what it is; required ones first."""
    kind = msgspec.inspect.type_info(config)
    assert isinstance(kind, msgspec.inspect.StructType)
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for field in sorted(kind.fields, key=lambda field: not field.required):
        if only is None or field.name in only:
            extra = getattr(field.type, "extra_json_schema", None) or {}
            cells = [_text(expected(field.type)), _default(field), _text(extra.get("description", ""))]
            rows.append(f"| `{field.name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _default(field: msgspec.inspect.Field) -> str:
    if field.required:
        return "**required**"
    value: Any = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()  # type: ignore
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value!r}`"


def _text(words: str) -> str:
    """Return plain words for a cell of a table, with the pages that they name as links."""
    escaped = html.escape(words, quote=False).replace("|", "\\|").replace("*", "\\*").replace("[", "\\[")
    escaped = re.sub(r"\bdocs/([\w/-]+)\.md", r"[\1](../\1.md)", escaped)
    return re.sub(r"`[^`]*`", lambda code: html.unescape(code[0]).replace("\\[", "[").replace("\\*", "*"), escaped)


def _help(main: Callable[[list[str]], int]) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        main(["--help"])
    return printed.getvalue()


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
