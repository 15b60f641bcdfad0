"""A run's `checkpoint.json`: what the run is, its progress, and the checkpoints to resume from.

The file is replaced only after every SAE's state of a step is on disk. The previous content, whose checkpoints still
exist, is kept in `checkpoint.previous.json` in case the file is damaged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from ...shared.core.disk import write_file
from ...shared.core.errors import ConfigError
from ...shared.store.format.checksum import crc32c
from ...shared.store.format.identity import StoreIdentity
from ..stream.normalization import RowScale

RECORD_NAME = "checkpoint.json"
PREVIOUS_NAME = "checkpoint.previous.json"


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """All SAEs' state at a step: the position in the stream, and the checksum of each SAE's file.

    `files` is empty in records of releases that kept no checksums.
    """

    step: int
    stream: dict[str, int]
    diverged: dict[str, str]
    files: dict[str, int] = {}


class RunRecord(msgspec.Struct, kw_only=True):
    """A run on disk. A field is None if the release that began the run did not record it.

    `pending` names the SAEs in training; `trained` holds the checksums of the final states of the SAEs that were
    trained before them. `lengths` are the numbers of steps of the run: the first one, and one per continuation.
    `row_scales` are by hook point; `scales` are the factors alone, of releases that shortened no rows. `axes` holds
    the checksums of the principal axes of hook points, or None if rows are not rotated; `rotated_kinds` are the kinds
    of SAEs whose rows the run rotates unless its configuration says. `batch_size`, `warmup_steps` and `settings`, by
    the SAE's name, are what was chosen for the run where its configuration leaves it open.
    """

    step: int
    finished: bool
    n_steps: int
    rows_per_epoch: int = 0
    diverged: dict[str, str]
    pending: list[str] | None = None
    trained: dict[str, int] = {}
    lengths: list[int] = []
    store: StoreIdentity | None = None
    scales: dict[str, float] | None = None
    row_scales: dict[str, RowScale] | None = None
    axes: dict[str, int] | None = None
    rotated_kinds: list[str] | None = None
    recipes: dict[str, dict[str, Any]] = {}
    batch_size: int | None = None
    warmup_steps: int | None = None
    settings: dict[str, dict[str, Any]] | None = None
    config: dict[str, Any] | None = None
    checkpoints: list[Checkpoint] = []


class _OldRecord(msgspec.Struct):
    """The record of releases that kept neither checksums nor the identity of the store."""

    step: int
    finished: bool
    n_steps: int
    rows_per_epoch: int
    diverged: dict[str, str]
    stream: dict[str, int] | None = None


def save_record(output: Path, record: RunRecord, before: RunRecord | None) -> None:
    """Replace the record; the one before it is kept."""
    if before is not None:
        write_file(output / PREVIOUS_NAME, _encode(before))
    write_file(output / RECORD_NAME, _encode(record))


def _encode(record: RunRecord) -> bytes:
    plain = msgspec.to_builtins(record)
    return (json.dumps({**plain, "crc32c": _checksum(plain)}, indent=2) + "\n").encode()


def _checksum(plain: dict[str, Any]) -> int:
    return crc32c(json.dumps(plain, sort_keys=True).encode())


def load_record(output: Path) -> tuple[RunRecord | None, list[str]]:
    """Return the record of the run in a folder, if there is one, and notes about a damaged file of it.

    Raises:
        ConfigError: neither the record nor the one before it is whole.
    """
    path, previous = output / RECORD_NAME, output / PREVIOUS_NAME
    if not path.exists() and not previous.exists():
        return None, []
    record = _read(path)
    if record is not None:
        return record, []
    before = _read(previous)
    if before is None:
        raise ConfigError(f"'{path}' is damaged; remove '{output}' to train again, or choose another output")
    return before, [f"'{path}' is damaged or missing; resuming from the record before it, '{previous.name}'"]


def _read(path: Path) -> RunRecord | None:
    """Return the record in a file; None if the file is missing, damaged, or without its checksum."""
    try:
        plain = json.loads(path.read_bytes())
        checksum = plain.pop("crc32c", None)
        if checksum is None and "checkpoints" not in plain:
            return _of_old_release(msgspec.convert(plain, _OldRecord))
        return msgspec.convert(plain, RunRecord) if checksum == _checksum(plain) else None
    except (OSError, ValueError, TypeError, AttributeError, msgspec.ValidationError):
        return None


def _of_old_release(old: _OldRecord) -> RunRecord:
    checkpoints = []
    if old.stream is not None:
        checkpoints.append(Checkpoint(step=old.step, stream=old.stream, diverged=old.diverged))
    return RunRecord(
        step=old.step,
        finished=old.finished,
        n_steps=old.n_steps,
        rows_per_epoch=old.rows_per_epoch,
        diverged=old.diverged,
        lengths=[old.n_steps],
        checkpoints=checkpoints,
    )
