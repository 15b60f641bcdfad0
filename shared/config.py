"""Read a stage's TOML file and command-line overrides into its frozen, typed configuration.

A configuration is a `msgspec.Struct` whose fields are `Annotated[type, Meta(description=...)]`:
the description becomes `--help`, and `Meta` bounds are checked. An unknown key is refused with
the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import msgspec.inspect
import msgspec.toml
from msgspec import Meta

from .errors import ConfigError, MissingFileError
from .paths import expand_home, user_path


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the stages' configurations; `~` in a path is the home folder."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            msgspec.structs.force_setattr(self, name, expand_home(getattr(self, name)))


Device = Annotated[str, Meta(description="auto, cpu, cuda or cuda:N; auto is CUDA where there is any.")]
Cache = Annotated[
    str | None, Meta(description="Folder for copies of a remote store's shards; the user's cache when absent.")
]
CacheBytes = Annotated[
    Annotated[int, Meta(ge=0)] | None, Meta(description="Bound on those copies; 64 GiB when absent.")
]
"""Fields of the stages that read a store."""

C = TypeVar("C", bound=Config)


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for the first key that is not known, naming the nearest that is."""
    known = sorted(known)
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        advice = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        raise ConfigError(f"{where}: unknown key '{key}'; {advice}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into a table."""
    try:
        return tomllib.loads(user_path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"no config file at '{path}'; give the path of a TOML file") from None
    except IsADirectoryError:
        raise MissingFileError(f"'{path}' is a folder; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}") from None


def to_config(cls: type[C], table: Mapping[str, Any], where: str) -> C:
    """Check a table's keys and values and return the configuration.

    `where` names the table's origin in error messages.
    """
    _check_table(table, msgspec.inspect.type_info(cls), where)
    try:
        return msgspec.convert(table, cls)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}".replace(" - at `$.", " at `")) from None


def _check_table(table: Any, kind: msgspec.inspect.Type, where: str) -> None:
    """Check the keys of a table and of the lists of tables inside it."""
    for part in _members(kind):
        if isinstance(part, msgspec.inspect.ListType) and isinstance(table, list):
            for number, item in enumerate(table, 1):
                _check_table(item, part.item_type, f"{where}, table {number}")
        elif isinstance(part, msgspec.inspect.StructType) and isinstance(table, dict):
            fields = {field.encode_name: field.type for field in part.fields}
            check_keys(table, fields, where)
            for key, value in table.items():
                _check_table(value, fields[key], f"{where}: [[{key}]]")


def parse_overrides(cls: type[Config], arguments: list[str]) -> dict[str, Any]:
    """Parse `--key value` and `--key=value` arguments; a list is `[a, b]` or `a,b`."""
    types = {field.name: field.type for field in _fields(cls)}
    overrides: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ConfigError(f"command line: unexpected '{argument}'; overrides are written --key value")
        key, given, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        check_keys([key], types, "command line")
        if not given:
            text = next(rest, None)
            if text is None:
                raise ConfigError(f"command line: --{key} needs a value")
        overrides[key] = _parse_value(text, tuple(map(type, _members(types[key]))))
    return overrides


def _fields(cls: type[Config]) -> tuple[msgspec.inspect.Field, ...]:
    kind = msgspec.inspect.type_info(cls)
    assert isinstance(kind, msgspec.inspect.StructType)
    return kind.fields


def _members(kind: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, ...]:
    """Return the members of a field's type, with `Meta` wrappers and unions undone."""
    if isinstance(kind, msgspec.inspect.Metadata):
        return _members(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return tuple(member for part in kind.types for member in _members(part))
    return (kind,)


def _parse_value(text: str, accepted: tuple[type, ...]) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    sequences = (msgspec.inspect.ListType, msgspec.inspect.VarTupleType)
    takes_list = any(kind in sequences for kind in accepted)
    if takes_list and not isinstance(value, list) and (msgspec.inspect.StrType not in accepted or "," in text):
        return [_parse_value(part.strip(), ()) for part in text.split(",")]
    if msgspec.inspect.StrType in accepted and not isinstance(value, (str, list)) and len(accepted) == 1:
        return text
    return value


def load_config(cls: type[C], path: str | Path | None, arguments: list[str]) -> C:
    """Return the configuration of a TOML file, if one is given, with command-line overrides."""
    table = read_toml(path) if path else {}
    where = str(path) if path else "command line"
    check_keys(table, cls.__struct_fields__, where)
    return to_config(cls, table | parse_overrides(cls, arguments), where)


def to_toml(config: Config) -> str:
    """Return the resolved configuration as TOML; keys that are None are left out."""
    plain = msgspec.to_builtins(config)
    return msgspec.toml.encode(_without_none(plain)).decode()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def describe(cls: type[Config]) -> str:
    """Return one line of help per configuration key: `--key`, default, sentence."""
    lines = []
    for field in _fields(cls):
        extra = getattr(field.type, "extra_json_schema", None) or {}
        if field.required:
            default = "required"
        elif field.default is msgspec.NODEFAULT:
            default = f"default {field.default_factory()!r}"
        else:
            default = f"default {field.default!r}"
        lines.append(f"  --{field.name:<22} {extra.get('description', '')} ({default})")
    return "\n".join(lines)
