"""Read an SAE's configuration and tensors from files that may be damaged or hostile."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from ...core.errors import SaeError, one_line

_FLOATS = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MOST_OF_FILE = 2
"""How many times its file's size an archive's content may be: tensors are stored as they are."""
_MOST_OF_NPZ = 4
"""The same for NumPy archives, which may be compressed."""
_PART = 1 << 24
"""How many values are checked at a time."""


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises:
        SaeError: it is unreadable, not JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise SaeError(f"{where} is damaged: {path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise SaeError(f"{where} is damaged: {path.name} is not a JSON object")
    return content


def read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    """Return a file's tensors, which stay in the file until they are used.

    Raises:
        SaeError: it is damaged, or a tensor is not finite in float32 or of a type that SAEs do not have.
    """
    try:
        tensors = load_file(path) if _is_utf8(path) else load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise SaeError(f"{where} is damaged: {path.name}: {error}") from None
    return _plain(tensors, path, where)


def _is_utf8(path: Path) -> bool:
    """Tell whether safetensors, which takes no other paths, can open a path itself."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_torch_archive(path: Path, where: str, described: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file that `torch.save` wrote, without running any code that it names.

    `described` receives entries of text, numbers and dictionaries, which are refused without it.

    Raises:
        SaeError: it is damaged, holds anything but named tensors, or would take more memory than its size allows.
    """
    size = path.stat().st_size
    too_large = SaeError(f"{where} is damaged: {path.name} has {size:,} bytes and unpacks to more")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_OF_FILE * size:
                raise too_large
            damaged = archive.testzip()
            if damaged is not None:
                raise SaeError(f"{where} is damaged: {damaged} in {path.name} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SaeError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).strip().split("\n")[0]
        raise SaeError(f"{where} cannot be read: {path.name} may hold tensors alone, and no code ({reason})") from None
    except Exception as error:  # what damaged bytes raise is not bounded
        reason = str(error).strip().split("\n")[0]
        raise SaeError(f"{where} is damaged: {path.name}: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise SaeError(f"{where} is damaged: {path.name} holds a {type(content).__name__}, expected named tensors")
    if described is not None:
        described |= {name: value for name, value in content.items() if isinstance(value, str | int | float | dict)}
        content = {name: value for name, value in content.items() if name not in described}
    other = [name for name, value in content.items() if not _is_dense(value)]
    if other:
        raise SaeError(f"{where} is damaged: '{other[0]}' in {path.name} is not a dense tensor")
    if sum(tensor.numel() * tensor.element_size() for tensor in content.values()) > _MOST_OF_FILE * size:
        raise too_large
    return _plain({name: tensor.detach() for name, tensor in content.items()}, path, where)


def read_npz(path: Path, where: str) -> dict[str, Tensor]:
    """Return the arrays of a NumPy archive; pickled objects are refused.

    Raises:
        SaeError: it is damaged, holds anything but numbers, or would take more memory than its size allows.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_OF_NPZ * size:
                raise SaeError(f"{where} is damaged: {path.name} has {size:,} bytes and unpacks to more")
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except SaeError:
        raise
    except Exception as error:  # what damaged bytes raise is not bounded
        raise SaeError(f"{where} is damaged: {path.name}: {one_line(error)}") from None
    return _plain(tensors, path, where)


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """Return a file's YAML mapping, without running what its tags name.

    Raises:
        SaeError: it is unreadable, not YAML, or no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise SaeError(f"{where} is damaged: {path.name} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SaeError(f"{where} is damaged: {path.name} is not a YAML mapping")
    return content


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def check_finite_tensor(name: str, tensor: Tensor, path: Path, where: str) -> None:
    """Raise `SaeError` unless a tensor is finite in float32; reads a part at a time, so that it takes no memory."""
    flat = tensor.detach().reshape(-1)
    n_bad = 0
    for part in flat.split(_PART):
        # A sum is finite only if every entry is; the count reveals an overflow.
        part = part.to(torch.float32)
        if not torch.isfinite(part.sum()):
            n_bad += int((~torch.isfinite(part)).sum())
    if n_bad:
        raise SaeError(
            f"{where} is damaged: {name} in {path.name} has {n_bad:,} of {tensor.numel():,} values that are "
            "NaN or infinite in float32"
        )


def _plain(tensors: dict[str, Tensor], path: Path, where: str) -> dict[str, Tensor]:
    """Return the tensors, floating-point ones finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS + _INTEGERS:
            raise SaeError(
                f"{where} is damaged: {name} in {path.name} holds {tensor.dtype}, expected floating-point numbers"
            )
        if tensor.dtype in _FLOATS:
            check_finite_tensor(name, tensor, path, where)
    return tensors
