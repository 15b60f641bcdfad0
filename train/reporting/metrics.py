"""Write each SAE's training metrics to `metrics.jsonl` and to other loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...shared.core.disk import write_file, writing
from .loggers import Logger

METRICS_NAME = "metrics.jsonl"
_STEPS_UNREAD = 64


class Line(NamedTuple):
    """A step's metrics by SAE."""

    step: int
    metrics: Mapping[str, Mapping[str, Any]]


class PendingLines:
    """Lines whose numbers may be on a GPU; those of 64 steps are read in one transfer."""

    def __init__(self, step: int):
        self._lines: list[Line] = []
        self._read_step = step

    def add(self, step: int, metrics: Mapping[str, Mapping[str, Any]]) -> bool:
        """Add a step's line and return whether to read now; lines without GPU numbers are read at once."""
        self._lines.append(Line(step, metrics))
        there = any(isinstance(value, Tensor) for by_name in metrics.values() for value in by_name.values())
        return not there or step - self._read_step >= _STEPS_UNREAD

    def read(self) -> list[Line]:
        """Read the numbers of all pending lines and return the lines."""
        numbers = [
            value
            for line in self._lines
            for by_name in line.metrics.values()
            for value in by_name.values()
            if isinstance(value, Tensor)
        ]
        read = iter(torch.stack([number.double() for number in numbers]).tolist() if numbers else [])
        lines = [
            Line(
                step,
                {
                    sae: {name: _number(value, read) for name, value in by_name.items()}
                    for sae, by_name in by_sae.items()
                },
            )
            for step, by_sae in self._lines
        ]
        if lines:
            self._lines, self._read_step = [], lines[-1].step
        return lines


class MetricsLog:
    """One SAE's metrics, a JSON object per line; values that are not finite become null.

    When a run resumes from a step, the lines after that step are dropped.
    """

    def __init__(self, folder: Path, resume_step: int = 0, loggers: Sequence[Logger] = ()):
        self._path = path = folder / METRICS_NAME
        with writing(path):
            kept = _lines_up_to(path, resume_step) if resume_step and path.exists() else b""
            write_file(path, kept)
            self._file = path.open("a", encoding="utf-8")
        self._loggers = loggers

    def write(self, step: int, tokens: int, metrics: Mapping[str, Any]) -> None:
        """Append one line."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        with writing(self._path):
            self._file.write(json.dumps({"step": step, "tokens": tokens, **plain}) + "\n")
        numbers = {key: value for key, value in plain.items() if isinstance(value, (int, float))}
        for logger in self._loggers:
            logger.write(step, tokens, numbers)

    def flush(self) -> None:
        """Flush the file to the operating system."""
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        """Close the file and the loggers."""
        with writing(self._path):
            self._file.close()
        for logger in self._loggers:
            logger.close()


def _number(value: Any, read: Iterator[float]) -> Any:
    return next(read) if isinstance(value, Tensor) else value


def _lines_up_to(path: Path, step: int) -> bytes:
    """Return the lines up to a step, without damaged ones."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return b"".join(kept)
