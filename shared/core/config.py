"""Read a stage's TOML file and command-line overrides into its frozen, typed configuration.

A configuration is a `msgspec.Struct` whose fields are `Annotated[type, Meta(description=...)]`. The description is
shown by `--help`. Types and `Meta` bounds are checked whether the values come from TOML, the command line or Python.
The error for an unknown key suggests the nearest known one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import msgspec.inspect
import msgspec.toml
from msgspec import Meta

from .config_values import accepted_types, check_value, choices
from .errors import ConfigError, MissingFileError
from .paths import expand_home, user_path


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the stages' configurations.

    Fields accept `Path`s, NumPy numbers and tuples in place of strings, numbers and lists, and convert them. `~` in a
    path is expanded to the home folder.

    Raises:
        ConfigError: a value has the wrong type or is out of bounds.
    """

    def __post_init__(self) -> None:
        """Check every field and convert its value to the field's type."""
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            if value is not field.default:
                value = expand_home(check_value(field.name, value, field.type))
                msgspec.structs.force_setattr(self, field.name, value)


MAX_SEED = 2**63 - 1
"""The largest seed that fits in the integers of TOML and of PyTorch's generators."""

Device = Annotated[str, Meta(description="auto, cpu, cuda or cuda:N; auto uses CUDA if available.")]
DeviceMap = Annotated[
    Literal["auto", "balanced", "balanced_low_0", "sequential"] | None,
    Meta(
        description="How accelerate spreads a model that is larger than a GPU over several GPUs, the host's memory and "
        "the disk (docs/large-models.md); needs thresher[spread]."
    ),
]
MaxMemory = Annotated[
    dict[str, str] | None,
    Meta(description='With device_map: most bytes on each device, as in {0 = "70GiB", cpu = "200GiB"}.'),
]
OffloadFolder = Annotated[
    str | None, Meta(description="With device_map: folder for weights on the disk (default: a temporary one).")
]
"""Fields of the stages that run a model."""
Cache = Annotated[
    str | None, Meta(description="Folder for cached shards of a remote store (default: the user's cache folder).")
]
CacheBytes = Annotated[
    Annotated[int, Meta(ge=0)] | None, Meta(description="Most bytes of shards to keep in the cache (default: 64 GiB).")
]
Roles = Annotated[
    Annotated[list[Literal["text", "marker", "system", "user", "assistant", "tool", "other"]], Meta(min_length=1)]
    | None,
    Meta(description='Roles of the rows to use in a store of chat text, such as ["assistant"] (default: all).'),
]
"""Fields of the stages that read a store."""

ConfigT = TypeVar("ConfigT", bound=Config)
_COMMAND_LINE = "command line"


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for the first unknown key, and suggest the nearest known one."""
    known = sorted(known)
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.5)
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
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from None


def to_config(cls: type[ConfigT], table: Mapping[str, Any], where: str, overridden: Iterable[str] = ()) -> ConfigT:
    """Check a table's keys and values and return the configuration.

    `where` names the origin of the table in error messages. Keys in `overridden` came from the command line instead.
    """
    _check_table(table, msgspec.inspect.type_info(cls), where)
    kept = {}
    for field in msgspec.structs.fields(cls):
        if field.name not in table:
            if field.required:
                raise ConfigError(_missing(cls, field, where))
            continue
        origin = f"command line: --{field.name}" if field.name in overridden else f"{where}: {field.name}"
        kept[field.name] = check_value(origin, table[field.name], field.type)
    try:
        return cls(**kept)
    except ConfigError as error:  # values that do not fit together
        raise ConfigError(f"{where}: {error}") from None


def _missing(cls: type[Config], field: msgspec.structs.FieldInfo, where: str) -> str:
    kind = next(kind for kind in _fields(cls) if kind.name == field.name).type
    description = (getattr(kind, "extra_json_schema", None) or {}).get("description", "")
    way = f"give a config file, or --{field.name}" if where == _COMMAND_LINE else "add it"
    return f"{where}: '{field.name}' is missing ({description.rstrip('.')}); {way}"


def _check_table(table: Any, kind: msgspec.inspect.Type, where: str) -> None:
    """Check the keys of a table and of the lists of tables inside it."""
    for part in accepted_types(kind):
        if isinstance(part, msgspec.inspect.ListType) and isinstance(table, list):
            for number, item in enumerate(table, 1):
                _check_table(item, part.item_type, f"{where}, table {number}")
        elif isinstance(part, msgspec.inspect.StructType) and isinstance(table, dict):
            fields = {field.encode_name: field.type for field in part.fields}
            check_keys(table, fields, where)
            for key, value in table.items():
                _check_table(value, fields[key], f"{where}: [[{key}]]")


def action_config(
    cls: type[ConfigT], arguments: list[str], names: tuple[str, ...], missing: str, unexpected: str
) -> ConfigT:
    """Return the configuration of a command's action, whose first arguments are the values of `names`.

    Raises:
        ConfigError: one of them is missing, with the text `missing`; or something else than options follows them, with
            `unexpected`, what was expected instead.
    """
    given = arguments[: len(names)]
    if len(given) < len(names) or any(argument.startswith("-") for argument in given):
        raise ConfigError(missing)
    other, options = parse_arguments(cls, arguments[len(names) :])
    if other is not None:
        raise ConfigError(f"unexpected '{other}'; expected {unexpected}")
    values: dict[str, Any] = dict(zip(names, given, strict=True))
    return to_config(cls, values | options, _COMMAND_LINE)


def parse_arguments(cls: type[Config], arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Return the config file that a command line names, if any, and its overrides.

    Overrides are written `--key value` or `--key=value`. A list is `["a", "b"]` or `a,b`. `--key` alone means `true`
    for a boolean key.
    """
    types = {field.name: tuple(map(type, accepted_types(field.type))) for field in _fields(cls)}
    path: str | None = None
    overrides: dict[str, Any] = {}
    rest = list(reversed(arguments))
    while rest:
        argument = rest.pop()
        if not argument.startswith("--"):
            if path is not None or argument.startswith("-"):
                raise ConfigError(
                    f"{_COMMAND_LINE}: unexpected '{argument}'; expected one config file and overrides, --key value"
                )
            path = argument
            continue
        key, given, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        check_keys([key], types, _COMMAND_LINE)
        if not given:
            flag = msgspec.inspect.BoolType in types[key] and msgspec.inspect.StrType not in types[key]
            if flag and (not rest or rest[-1].lower() not in ("true", "false")):
                text = "true"
            elif not rest:
                raise ConfigError(f"{_COMMAND_LINE}: --{key} needs a value")
            else:
                text = rest.pop()
        try:
            overrides[key] = _parse_value(text, types[key])
        except ValueError:
            raise ConfigError(
                f"{_COMMAND_LINE}: --{key} '{text}' is not a list in TOML; "
                'write [1, 2], ["a", "b"] or, for tables, [{ key = "value" }]'
            ) from None
    return path, overrides


def _fields(cls: type[Config]) -> tuple[msgspec.inspect.Field, ...]:
    kind = msgspec.inspect.type_info(cls)
    assert isinstance(kind, msgspec.inspect.StructType)
    return kind.fields


def _parse_value(text: str, accepted: tuple[type, ...]) -> Any:
    """Return the value of an override; raise `ValueError` for a list that is not TOML."""
    if msgspec.inspect.BoolType in accepted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    sequences = (msgspec.inspect.ListType, msgspec.inspect.VarTupleType)
    takes_list = any(kind in sequences for kind in accepted)
    if takes_list and not isinstance(value, list) and (msgspec.inspect.StrType not in accepted or "," in text):
        if text.lstrip().startswith(("[", "{")) and isinstance(value, str):
            raise ValueError(text)
        return [_parse_value(part.strip(), ()) for part in text.split(",")]
    if msgspec.inspect.StrType in accepted and not isinstance(value, (str, list)) and len(accepted) == 1:
        return text
    return value


def load_config(cls: type[ConfigT], path: str | Path | None, arguments: list[str]) -> ConfigT:
    """Return the configuration from a TOML file, if `path` is given, and command-line overrides."""
    named, overrides = parse_arguments(cls, arguments)
    if named is not None and path is not None:
        raise ConfigError(f"{_COMMAND_LINE}: unexpected '{named}'; '{path}' is the config file already")
    path = path or named
    table = read_toml(path) if path else {}
    return to_config(cls, table | overrides, str(path) if path else _COMMAND_LINE, overrides)


def configured(cls: type[ConfigT], config: ConfigT | str | Path | None, settings: Mapping[str, Any]) -> ConfigT:
    """Return the configuration that a stage was called with, its keys replaced by `settings`.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type; or `config` is something else.
        MissingFileError: there is no such file.
    """
    if isinstance(config, cls):
        return to_config(cls, {**msgspec.structs.asdict(config), **settings}, "keywords") if settings else config
    if config is not None and not isinstance(config, str | Path):
        raise ConfigError(
            f"expected {cls.__name__}(...), the path of a TOML file, or keywords; got {type(config).__name__}"
        )
    table = read_toml(config) if config is not None else {}
    return to_config(cls, {**table, **settings}, "keywords" if config is None else str(config))


def to_toml(config: Config) -> str:
    """Return the resolved configuration as TOML, without keys that are None."""
    plain = msgspec.to_builtins(config)
    return msgspec.toml.encode(_without_none(plain)).decode()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def help_text(cls: type[Config], keys: Collection[str] | None = None, dashes: str = "--") -> str:
    """Return one line of help per configuration key, or per key in `keys`: `--key`, sentence, choices, default.

    Required keys come first. Choices that the sentence names are not repeated.
    """
    lines = []
    for field in sorted(_fields(cls), key=lambda field: not field.required):
        if keys is not None and field.name not in keys:
            continue
        extra = getattr(field.type, "extra_json_schema", None) or {}
        if field.required:
            default = "required"
        elif field.default is msgspec.NODEFAULT:
            default = f"default {field.default_factory()!r}"
        else:
            default = "optional" if field.default is None else f"default {field.default!r}"
        description = extra.get("description", "")
        allowed = [value for value in choices(field.type) if not re.search(rf"\b{re.escape(value)}\b", description)]
        if allowed:
            default = f"choices: {', '.join(choices(field.type))}; {default}"
        lines.append(f"  {dashes + field.name:<26} {description} ({default})")
    return "\n".join(lines)
