"""Write a configuration as TOML in which each key has its description as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import tomli_w

from thresher.shared.core.config import Config

_WIDTH = 100


def commented_toml(
    cls: type[Config],
    heading: Sequence[str],
    values: Mapping[str, Any],
    defaults: Config,
    optional: Sequence[str],
    tables: tuple[str, type[Config], Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """Return a file with `heading`, the keys in `values`, and those in `optional` as comments with their defaults.

    A key in `optional` whose value differs from its default in the class is written as a key. `tables` are a list of
    tables, its name and the class that describes its keys.
    """
    described = descriptions(cls)
    own = {field.name: field.default for field in msgspec.structs.fields(cls)}
    changed = {key: getattr(defaults, key) for key in optional if getattr(defaults, key) != own[key]}
    lines = [*_comment(heading)]
    for key, value in {**values, **changed}.items():
        lines += ["", *_comment([described[key]]), _assignment(key, value)]
    left = [key for key in optional if key not in changed]
    lines += ["", "# Some more keys, with their defaults; --help lists all."]
    for key in left:
        lines += ["", *_comment([described[key]]), f"# {_assignment(key, own[key])}"]
    if tables is not None:
        name, table_class, rows = tables
        lines += ["", *_comment([described[name]])]
        described = descriptions(table_class)
        for number, row in enumerate(rows):
            lines += ["", f"[[{name}]]"]
            for key, value in row.items():
                if number == 0 and key in described:
                    lines += _comment([described[key]])
                lines.append(_assignment(key, value))
    return "\n".join(lines) + "\n"


def descriptions(cls: type[Config]) -> dict[str, str]:
    """Return the description of each key of a configuration, or an empty text."""
    kind = msgspec.inspect.type_info(cls)
    assert isinstance(kind, msgspec.inspect.StructType)
    return {
        field.name: (getattr(field.type, "extra_json_schema", None) or {}).get("description", "")
        for field in kind.fields
    }


def _comment(sentences: Sequence[str]) -> list[str]:
    return [f"# {line}" for sentence in sentences for line in textwrap.wrap(sentence, _WIDTH)]


def _assignment(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{key} = {value:_}"
    if isinstance(value, list):
        return f"{key} = [{', '.join(_assignment('', item).removeprefix(' = ') for item in value)}]"
    return tomli_w.dumps({key or "x": value}).strip().removeprefix("x = " if not key else "")
