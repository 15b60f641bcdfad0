"""Extract documents from table rows: find the columns of content and name, and check the values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .tally import RowLocation, Tally

NAME_COLUMNS = ("path", "name", "title", "url", "id")
LIST_COLUMNS = ("messages", "conversation", "conversations", "input_ids", "token_ids")
"""Columns that are not text: a string in brackets there is how a table writes a list."""
MAX_NAME = 200
MAX_COLUMNS = 20
SKIP = 'or set on_bad_document = "skip" to skip it'
_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for the roles."""
_MISSING = object()


class Document(NamedTuple):
    """One document and where it is from: a path, a title, or dataset and row.

    A document is plain text, or a conversation (`messages`, dicts with role and content), or already tokenized
    (`input_ids`); `text` is empty for the latter two.
    """

    name: str
    text: str
    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None

    @property
    def kind(self) -> str:
        """The kind of content: "text", "messages" or "token ids"."""
        if self.messages is not None:
            return "messages"
        return "text" if self.input_ids is None else "token ids"

    @property
    def n_characters(self) -> int:
        """The characters of the text, or of all messages."""
        contents = [message.get("content") for message in self.messages or ()]
        return len(self.text) + sum(len(text) for text in contents if isinstance(text, str))


class Columns:
    """The columns of the content (a name, or a dotted path into nested columns) and of the document's name."""

    def __init__(self, column: str, tally: Tally) -> None:
        self.column = column
        self._tally = tally
        parts = column.split(".")
        self._roots = {".".join(parts[: n + 1]) for n in range(len(parts))}
        self._name_column = ""
        self._kind: str | None = None
        self._holds_lists = parts[-1] in LIST_COLUMNS
        self._n_rows = 0

    def needed(self, names: Iterable[str]) -> list[str]:
        """Return the columns to read for content and name; none if the content is missing."""
        names = list(names)
        if not self._roots & set(names):
            return []
        return [name for name in names if name in self._roots or name in NAME_COLUMNS]

    def missing(self, row: Iterable[str] | Mapping[str, Any]) -> str:
        """Return the error message for a table or row without the column; it lists the existing columns."""
        names = [name[:40] for name in _paths(row)]
        names = ", ".join(names[:MAX_COLUMNS]) + (", ..." if len(names) > MAX_COLUMNS else "")
        return (
            f"has no column '{self.column}'; set text_column to one of {names or 'its columns, of which it has none'}"
        )

    def document(self, row: Mapping[str, Any], at: RowLocation) -> Document | None:
        """Return the document of a row; None if it is damaged and damaged documents are skipped.

        A row is named by its path, name, title, URL or id, whichever the first row has, or by its number.
        """
        number, self._n_rows = self._n_rows, self._n_rows + 1
        value = _find(row, self.column)
        if value is _MISSING:
            self._tally.bad(at, self.missing(row), SKIP)
            return None
        if number == 0:
            self._name_column = next((name for name in NAME_COLUMNS if isinstance(row.get(name), (str, int))), "")
        name = str(row.get(self._name_column))[:MAX_NAME] if self._name_column else f"row {number}"
        is_list = not (self._holds_lists and isinstance(value, str) and value.lstrip().startswith("["))
        document = _document(encodable(name), value) if is_list else None
        if document is None:
            self._tally.bad(
                at,
                f"must hold text, a list of messages or a list of token ids in column '{self.column}', "
                f"got {self._described(value)}",
            )
            return None
        if value != []:  # an empty list may be of either kind
            self._kind = self._kind or document.kind
            if document.kind != self._kind:
                self._tally.bad(
                    at, f"holds {document.kind} in column '{self.column}', where the rows before it hold {self._kind}"
                )
                return None
        return document

    def _described(self, value: Any) -> str:
        if isinstance(value, Mapping):
            inner = ", ".join(f"{self.column}.{name}" for name in _paths(value))
            return f"the nested columns {inner}"
        if isinstance(value, str):
            return "a list that is written as text"
        return "null" if value is None else type(value).__name__


def encodable(text: str) -> str:
    """Return the text with what UTF-8 cannot encode replaced by question marks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _find(row: Mapping[str, Any], column: str) -> Any:
    """Return the value at a dotted path into nested columns, whose names may also contain dots."""
    if column in row:
        return row[column]
    parts = column.split(".")
    for n in range(1, len(parts)):
        inner = row.get(".".join(parts[:n]))
        if isinstance(inner, Mapping) and (found := _find(inner, ".".join(parts[n:]))) is not _MISSING:
            return found
    return _MISSING


def _paths(row: Iterable[str] | Mapping[str, Any]) -> list[str]:
    if not isinstance(row, Mapping):
        return list(row)
    paths = []
    for name, value in row.items():
        paths += [f"{name}.{inner}" for inner in _paths(value)] if isinstance(value, Mapping) and value else [name]
    return paths


def _document(name: str, value: Any) -> Document | None:
    if isinstance(value, str):
        return Document(name, value)
    if not isinstance(value, list):
        return None
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value) and value:
        return Document(name, "", input_ids=value)
    messages = [_message(item) for item in value]
    return Document(name, "", messages=messages) if None not in messages else None  # pyright: ignore[reportArgumentType]


def _message(item: Any) -> dict[str, Any] | None:
    """Return a message with role and content, converting ShareGPT's from and value; None for anything else.

    Keys that hold null are left out, because a table has every key in every message.
    """
    if not isinstance(item, Mapping):
        return None
    message = {key: value for key, value in item.items() if value is not None or key == "content"}
    if "role" not in message and {"from", "value"} <= message.keys():
        role = message.pop("from")
        message = {"role": _ROLES.get(str(role), role), "content": message.pop("value"), **message}
    return message if isinstance(message.get("role"), str) else None
