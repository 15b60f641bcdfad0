"""Checkpoints of a whole sweep: all SAEs at one step, written so that a kill at any moment is harmless.

`<output>/checkpoint.json` names the step; it is replaced only after every SAE's file of that step is safe,
and older files are removed only after that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..shared.errors import ConfigError

RECORD_NAME = "checkpoint.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that readers and crashes see the old or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file(output: Path, name: str, step: int) -> Path:
    return output / name / "checkpoints" / f"step-{step:09d}.safetensors"


def save_state(output: Path, name: str, step: int, state: Mapping[str, Tensor]) -> None:
    """Write one SAE's state of a step."""
    path = _file(output, name, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def load_state(
    output: Path,
    name: str,
    step: int,
    rows: slice | None = None,
    has_rows: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Read one SAE's state of a step; of the tensors that a part of the latents have rows in, only theirs."""
    state = {}
    with safe_open(_file(output, name, step), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            whole = rows is None or not has_rows(key) or not file.get_slice(key).get_shape()
            state[key] = file.get_tensor(key) if whole else file.get_slice(key)[rows]
    return state


def save_record(output: Path, record: Mapping[str, Any], keep: int) -> None:
    """Make a step's checkpoint the one to resume from, and remove all but the last `keep`."""
    write_atomically(output / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    for folder in output.glob("*/checkpoints"):
        for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
            old.unlink()
        for partial in folder.glob(".*.partial"):
            partial.unlink()


def load_record(output: Path) -> dict[str, Any] | None:
    """Return the record of the checkpoint to resume from, if there is one.

    Raises:
        ConfigError: the record is not readable.
    """
    try:
        return json.loads((output / RECORD_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"'{output / RECORD_NAME}' is damaged; remove '{output}' or choose another output") from None
