"""Count what is read and what is left out, handle damaged documents, and print a one-line summary."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ...shared.core.errors import DataError

_log = logging.getLogger(__name__)

ADVICE = 'repair it, or set on_bad_document = "skip" to skip what cannot be read'


@dataclass
class RowLocation:
    """The location of a row, for messages: a file or dataset, the unit (row or line), and the number."""

    source: str
    unit: str = "row"
    number: int = 0

    def __str__(self) -> str:
        """Return the location as text."""
        return f"'{self.source}', {self.unit} {self.number}"


@dataclass
class Tally:
    """Counts of what was read from a source, and of what was left out and why."""

    source: str
    skips_bad: bool = False
    n_found: int | None = None  # files; None for a Hugging Face dataset
    n_files: int = 0
    n_documents: int = 0
    n_characters: int = 0
    n_token_ids: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> what
    n_bad: int = 0
    first_bad: str = ""

    def leave_out(self, reason: str, what: str) -> None:
        """Count something that is not read."""
        self.left_out.setdefault(reason, []).append(what)

    def bad(self, where: RowLocation | str, what: str, advice: str = ADVICE) -> None:
        """Count a document, or the rest of a file, that cannot be read; raise `DataError` unless they are skipped."""
        fault = f"{where} {what}" if isinstance(where, RowLocation) else f"'{where}' {what}"
        if not self.skips_bad:
            raise DataError(f"{fault}; {advice}")
        self.n_bad += 1
        self.first_bad = self.first_bad or fault

    def nothing(self) -> DataError:
        """Return the error for a source without documents."""
        return DataError(f"no text in '{self.source}'; {self._passed_over() or 'it holds no documents'}")

    def print_summary(self) -> None:
        """Print what was read and what was left out."""
        summary = f"{self.n_documents:,} document{'s' * (self.n_documents != 1)}"
        if self.n_found is not None:
            of = f"{self.n_files:,} of " if self.n_files != self.n_found else ""
            summary = f"{of}{self.n_found:,} file{'s' * (self.n_found != 1)}, {summary}"
        amounts = [f"{self.n_characters:,} characters"] if self.n_characters or not self.n_token_ids else []
        amounts += [f"{self.n_token_ids:,} token ids"] if self.n_token_ids else []
        passed_over = self._passed_over()
        end = f"; {passed_over}" if passed_over else ""
        _log.info(f"text: read {summary}, {' and '.join(amounts)} from '{self.source}'{end}")

    def print_left_out(self) -> None:
        """Print what is left out, as far as it is known before reading."""
        if self.left_out:
            _log.info(f"text: from '{self.source}', {self._passed_over()}")

    def _passed_over(self) -> str:
        parts = []
        if self.left_out:
            reasons = [f"{len(what):,} {reason} ({_some(what)})" for reason, what in self.left_out.items()]
            parts.append(f"left out: {', '.join(reasons)}")
        if self.n_bad:
            parts.append(f"skipped {self.n_bad:,} damaged, first {self.first_bad}")
        return "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
