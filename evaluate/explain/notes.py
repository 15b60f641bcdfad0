"""What people write about latents: a label, a comment, a star and lists, in SQLite beside the evaluation.

A label stands before the explanations in the report. A note remembers which index it was made on, so that it is not
taken for one of another SAE of the same name.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...shared.core.errors import ConfigError, OutputError
from ..features.files import FeatureIndex
from ..results.output import parquet_bytes
from .table import SCORED, read_explanations

NOTES_NAME = "notes.sqlite"
NOTE = "note"
LONGEST_LABEL, LONGEST_COMMENT, MOST_LISTS, LONGEST_LIST = 300, 10_000, 20, 100
_FIELDS = ("sae", "latent", "label", "comment", "starred", "lists", "updated", "fingerprint")
_SCHEMA = pa.schema(
    [
        ("sae", pa.string()),
        ("latent", pa.int64()),
        ("label", pa.string()),
        ("comment", pa.string()),
        ("starred", pa.bool_()),
        ("lists", pa.list_(pa.string())),
        ("updated", pa.string()),
        ("fingerprint", pa.string()),
    ]
)


class Notes:
    """The notes of an evaluation. Every change is durable once its call returns; several threads may call."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=30)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute(
                    "CREATE TABLE IF NOT EXISTS notes (sae TEXT, latent INTEGER, label TEXT, comment TEXT, "
                    "starred INTEGER, lists TEXT, updated TEXT, fingerprint TEXT, PRIMARY KEY (sae, latent))"
                )
                yield db
        except sqlite3.Error as error:
            raise OutputError(f"the notes in '{self.path}' cannot be read or written: {error}") from None

    def put(
        self,
        sae: str,
        latent: int,
        *,
        label: str = "",
        comment: str = "",
        starred: bool = False,
        lists: list[str] | None = None,
        fingerprint: str | None = None,
    ) -> dict[str, Any] | None:
        """Write a latent's note in place of the one that it has, and return it; an empty one is removed.

        Raises:
            ConfigError: a text is too long, or there are too many lists.
            OutputError: the file cannot be written.
        """
        named = list(dict.fromkeys(filter(None, (name.strip() for name in lists or ()))))
        for what, text, longest in (("label", label, LONGEST_LABEL), ("comment", comment, LONGEST_COMMENT)):
            if len(text) > longest:
                raise ConfigError(f"the {what} has {len(text):,} characters; expected at most {longest:,}")
        if len(named) > MOST_LISTS or any(len(name) > LONGEST_LIST for name in named):
            raise ConfigError(f"expected at most {MOST_LISTS} lists with names of at most {LONGEST_LIST} characters")
        key = (sae, latent)
        with self._open() as db, db:
            if not label.strip() and not comment.strip() and not starred and not named:
                db.execute("DELETE FROM notes WHERE sae = ? AND latent = ?", key)
                return None
            now = datetime.now(UTC).isoformat(timespec="seconds")
            values = (*key, label.strip(), comment, int(starred), json.dumps(named), now, fingerprint)
            db.execute(f"REPLACE INTO notes ({', '.join(_FIELDS)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        return _note(values)

    def all(self, sae: str | None = None) -> list[dict[str, Any]]:
        """Return the notes, of one SAE or of all, by SAE and latent."""
        if not self.path.is_file():
            return []
        with self._open() as db:
            sql = f"SELECT {', '.join(_FIELDS)} FROM notes WHERE ?1 IS NULL OR sae = ?1 ORDER BY sae, latent"
            return [_note(row) for row in db.execute(sql, [sae])]

    def get(self, sae: str, latent: int) -> dict[str, Any] | None:
        """Return a latent's note, or None."""
        if not self.path.is_file():
            return None
        with self._open() as db:
            sql = f"SELECT {', '.join(_FIELDS)} FROM notes WHERE sae = ? AND latent = ?"
            row = db.execute(sql, [sae, latent]).fetchone()
        return None if row is None else _note(row)

    def parquet(self) -> bytes:
        """Return all notes as a Parquet file."""
        return parquet_bytes(pa.Table.from_pylist(self.all(), _SCHEMA))


def _note(row: tuple[Any, ...]) -> dict[str, Any]:
    note = dict(zip(_FIELDS, row, strict=True))
    return note | {"starred": bool(note["starred"]), "lists": json.loads(note["lists"])}


def notes_path(evaluation: Path) -> Path:
    """Return where the notes of an evaluation are."""
    return evaluation / NOTES_NAME


def shown_explanations(index: FeatureIndex) -> dict[int, list[dict[str, Any]]]:
    """Return what the report says of an index's latents: the labels of notes that fit it, then the explanations."""
    found = read_explanations(index)
    fingerprint = index.metadata.get("fingerprint")
    for note in Notes(notes_path(index.path.parent.parent)).all(index.name):
        if note["label"] and note["fingerprint"] == fingerprint:
            said = f"{note['label']}. {note['comment']}" if note["comment"].strip() else note["label"]
            scores = {f"{score}{end}": None for score in SCORED for end in ("", "_low", "_high")}
            line = {"latent": note["latent"], "explanation": said, "explainer": NOTE, "is_baseline": False}
            found[note["latent"]] = [line | scores, *found.get(note["latent"], [])]
    return found
