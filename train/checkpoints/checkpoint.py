"""The state of each SAE at a step, in a file with a checksum; a kill at any moment leaves a usable checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...shared.core.disk import replacing
from ...shared.core.errors import OutputError
from ...shared.store.format.checksum import crc32c


def state_path(output: Path, name: str, step: int) -> Path:
    """Return the file of one SAE's state at a step."""
    return output / name / "checkpoints" / f"step-{step:09d}.safetensors"


def sae_path(output: Path, name: str, step: int) -> Path:
    """Return the folder of one SAE as it was saved at a step."""
    return state_path(output, name, step).with_suffix("")


def save_state(output: Path, name: str, step: int, state: Mapping[str, Tensor]) -> int:
    """Write one SAE's state at a step, as `save_tensors` does, and return its checksum."""
    return save_tensors(state_path(output, name, step), state)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write tensors to a file, read it back, and return the checksum of what is in memory.

    Raises:
        OutputError: the file cannot be written, or what is read back is not what was written.
        DiskSpaceError: the disk is full.
    """
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    checksum = checksum_of(plain)
    with replacing(path) as partial:
        save_file(plain, partial)
        fault = fault_of(partial, checksum)
        if fault:
            raise OutputError(f"the checkpoint '{path}' {fault} right after it was written; check the disk")
    return checksum


def fault_of(path: Path, checksum: int | None) -> str | None:
    """Return what is wrong with a state file, or None; without a checksum, only whether it is readable is checked."""
    try:
        with safe_open(path, "pt") as file:
            found = _checksum((key, file.get_tensor(key)) for key in sorted(file.keys()))
    except FileNotFoundError:
        return "is missing"
    except (SafetensorError, OSError, ValueError):
        return "is not readable"
    return "does not have its checksum" if checksum is not None and found != checksum else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file; none if it is missing or not readable."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError):
        return {}


def checksum_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32C of tensors in host memory, and of their names, types and shapes."""
    return _checksum((name, tensors[name]) for name in sorted(tensors))


def _checksum(tensors: Iterable[tuple[str, Tensor]]) -> int:
    checksum = 0
    for name, tensor in tensors:
        checksum = crc32c(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        if tensor.numel():
            checksum = crc32c(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def load_state(
    output: Path,
    name: str,
    step: int,
    rows: slice | None = None,
    has_rows: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Read one SAE's state at a step; with `rows`, only those rows of the tensors that have one row per latent."""
    state = {}
    with safe_open(state_path(output, name, step), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            whole = rows is None or not has_rows(key) or not file.get_slice(key).get_shape()
            state[key] = file.get_tensor(key) if whole else file.get_slice(key)[rows]
    return state


def remove_saes(output: Path, name: str) -> None:
    """Remove what was saved of an SAE before the end of its training."""
    for folder in (output / name / "checkpoints").glob("step-*/"):
        shutil.rmtree(folder)


def remove_states(output: Path, name: str, keep: Iterable[int]) -> None:
    """Remove an SAE's state files, except those of some steps, and partly written files of a killed process."""
    kept = {state_path(output, name, step) for step in keep}
    for path in (output / name / "checkpoints").glob("*"):
        if path not in kept and (path.suffix == ".safetensors" or path.name.endswith(".partial")):
            path.unlink()
