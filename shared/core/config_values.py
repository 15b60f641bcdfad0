"""Check one value of a configuration against its field's type, and describe what was expected."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import msgspec.inspect as types

from .errors import ConfigError

_SHOWN_CHARACTERS = 80


def check_value(key: str, value: Any, annotation: Any) -> Any:
    """Convert a value to its field's type: paths to strings, NumPy numbers and arrays to Python's.

    Raises:
        ConfigError: the value has the wrong type, is out of bounds, not finite, an empty string, or not UTF-8.
    """
    kind = types.type_info(annotation)
    plain = plain_value(value)
    _refuse_other_encodings(key, plain)
    try:
        _refuse_nonsense(plain)
        return msgspec.convert(plain, annotation)
    except msgspec.ValidationError as error:
        parts = _items(kind) if isinstance(plain, list) else accepted_types(kind)
        if isinstance(plain, (list, dict)) and any(isinstance(part, types.StructType) for part in parts):
            raise ConfigError(f"{key}: {error}") from None
        raise ConfigError(f"{key}: expected {expected(kind)}, got {_shown(value)}{_advice(key, value, kind)}") from None


def plain_value(value: Any) -> Any:
    """Convert paths to strings, and NumPy and PyTorch values to Python's, also inside lists and tables."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value


def _refuse_nonsense(value: Any) -> None:
    """Raise `ValidationError` for numbers that are not finite and for empty strings, which no key accepts."""
    if isinstance(value, float) and not math.isfinite(value):
        raise msgspec.ValidationError
    if isinstance(value, str) and not value.strip():
        raise msgspec.ValidationError
    for item in value if isinstance(value, (list, tuple)) else ():
        _refuse_nonsense(item)


def _refuse_other_encodings(key: str, value: Any) -> None:
    """Refuse file names that are not UTF-8, because TOML, and so the saved configuration, cannot hold them."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            shown = value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise ConfigError(
                f"{key}: '{shown}' is not UTF-8, which config files cannot hold; rename the file or folder"
            ) from None
    for item in value if isinstance(value, (list, tuple)) else ():
        _refuse_other_encodings(key, item)


def accepted_types(kind: types.Type) -> tuple[types.Type, ...]:
    """Return the types that a field accepts: the members of unions, without `Meta` annotations."""
    if isinstance(kind, types.Metadata):
        return accepted_types(kind.type)
    if isinstance(kind, types.UnionType):
        return tuple(member for part in kind.types for member in accepted_types(part))
    return (kind,)


def _items(kind: types.Type) -> list[types.Type]:
    parts = accepted_types(kind)
    return [item for part in parts for item in accepted_types(getattr(part, "item_type", part))]


def choices(kind: types.Type) -> tuple[str, ...]:
    """Return the strings that a field accepts, or that the items of its lists may be, if these are a fixed few."""
    return tuple(str(value) for part in _items(kind) if isinstance(part, types.LiteralType) for value in part.values)


def expected(kind: types.Type) -> str:
    """Return in words what a field accepts, such as `an integer of at least 1`."""
    parts = [part for part in accepted_types(kind) if not isinstance(part, types.NoneType)]
    return " or ".join(dict.fromkeys(map(_in_words, parts)))


def _in_words(kind: types.Type) -> str:
    match kind:
        case types.BoolType():
            return "true or false"
        case types.IntType():
            return "an integer" + _bounds(kind)
        case types.FloatType():
            return "a number" + _bounds(kind)
        case types.StrType():
            return "text"
        case types.LiteralType(values):
            return ("one of " if len(values) > 1 else "") + ", ".join(map(repr, values))
        case types.ListType(item) | types.VarTupleType(item):
            some = "at least one item, " if kind.min_length else ""
            return (
                f"a list ({some}each {expected(item)})" if not isinstance(item, types.AnyType) else "a list of tables"
            )
        case types.StructType() | types.DictType():
            return "a table"
    return "another type"


def _bounds(kind: types.IntType | types.FloatType) -> str:
    named = (("of at least", kind.ge), ("above", kind.gt), ("of at most", kind.le), ("below", kind.lt))
    given = ((words, bound) for words, bound in named if bound is not None)
    return " and".join(f" {words} {bound if isinstance(bound, int) else f'{bound:g}'}" for words, bound in given)


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _advice(key: str, value: Any, kind: types.Type) -> str:
    """Return advice on common mistakes, preceded by a semicolon; else an empty string."""
    parts = accepted_types(kind)
    if isinstance(value, Mapping) and any(isinstance(part, types.ListType) for part in parts):
        return f"; write [[{key.split()[-1].lstrip('-')}]], with two brackets on either side"
    choices = [choice for part in parts if isinstance(part, types.LiteralType) for choice in part.values]
    near = difflib.get_close_matches(str(value).lower(), map(str, choices), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
