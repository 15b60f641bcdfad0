"""Keep every answer in a SQLite file as soon as it comes, by the hash of the request, so that none is paid twice."""

from __future__ import annotations

import fcntl
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ....shared.core.disk import writing
from ....shared.core.errors import OutputBusyError, OutputError
from .request import Answer

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    request TEXT PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    refusal INTEGER NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER
) WITHOUT ROWID
"""


class AnswerCache:
    """Answers by request hash. An answer is on disk once `put` returns. One process at a time may hold the file.

    Raises:
        OutputBusyError: another process holds it.
        OutputError: the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._held = path.with_name(f".{path.name}.lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.close()
            raise OutputBusyError(f"another `thresher explain` uses '{path}'; wait until it has ended") from None
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, timeout=60)
        try:
            with self._reporting():
                self._database.execute("PRAGMA synchronous = FULL")
                self._database.execute(SCHEMA)
                self._database.commit()
        except BaseException:
            self.close()
            raise

    def get(self, request: str) -> Answer | None:
        """Return the answer to a request, or None."""
        with self._reporting():
            row = self._database.execute(
                "SELECT text, finish_reason, refusal, prompt_tokens, completion_tokens FROM answers WHERE request = ?",
                (request,),
            ).fetchone()
        return None if row is None else Answer(row[0], row[1], bool(row[2]), row[3], row[4])

    def put(self, request: str, kind: str, answer: Answer) -> None:
        """Keep an answer."""
        row = (request, kind, answer.text, answer.finish_reason, int(answer.refusal))
        with self._reporting():
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*row, answer.prompt_tokens, answer.completion_tokens),
            )
            self._database.commit()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise OutputError(
                    f"cannot use the answers in '{self.path}' ({error}); make room or make it writable, or delete it "
                    "to ask everything again"
                ) from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
