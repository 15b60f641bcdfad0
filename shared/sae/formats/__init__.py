"""Files of SAEs, one module per format: how it is recognised, read and written. None needs the library of the format.

Every reader refuses by name what it does not understand, so that no key that changes what an SAE computes is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...core.errors import MissingFileError, SaeError
from ...core.paths import user_path
from . import cross_layer, dictionary_learning, saelens, sparsify
from .format import SaeFormat
from .parts import SaeParts
from .published import circuit_tracer, gemma_scope, gemma_scope_2, llama_scope, llamascopium, torch_files

FORMATS = (
    cross_layer.FORMAT,
    llamascopium.FORMAT,
    llama_scope.FORMAT,
    saelens.FORMAT,
    sparsify.FORMAT,
    dictionary_learning.FORMAT,
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    circuit_tracer.FORMAT,
    torch_files.FORMAT,
)
"""The formats, in the order in which they are asked: the first that finds an SAE reads it."""

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_NOT_SAES = ("checkpoints",)
"""Folders of training state, which may hold weights in files of their own."""
_WEIGHTS = (*_PICKLES, ".safetensors", ".npz")


def find_saes(path: str | Path) -> list[tuple[SaeFormat, Path]]:
    """Return the SAEs that a folder or file itself holds, each with its format; none where there is no such path."""
    for fmt in FORMATS:
        try:
            found = fmt.find(user_path(path))
        except OSError:
            continue
        if found:
            return [(fmt, each) for each in found]
    return []


def walk_saes(path: str | Path) -> tuple[list[tuple[SaeFormat, Path]], list[str]]:
    """Return the SAEs in a folder and in all folders below it, and a line for each folder of weights not recognised.

    Folders come in natural order: `layer_2` before `layer_10`.
    """
    found = find_saes(path)
    if found or not user_path(path).is_dir():
        return found, []
    notes: list[str] = []
    entries = sorted(user_path(path).iterdir(), key=natural_order)
    weights = [entry.name for entry in entries if entry.is_file() and entry.suffix in _WEIGHTS]
    if weights:
        notes.append(f"'{path}' has {weights[0]}, which no known format has")
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in _NOT_SAES:
            inside, unknown = walk_saes(entry)
            found, notes = found + inside, notes + unknown
    return found, notes


def natural_order(path: Path) -> list[tuple[str, int]]:
    """Return a sort key by which numbers in names are compared as numbers."""
    return [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def is_sae(folder: str | Path) -> bool:
    """Return whether a folder or file is one SAE of a known format."""
    return len(find_saes(folder)) == 1


def find_format(name: str) -> SaeFormat:
    """Return the format with a name that can be written.

    Raises:
        SaeError: there is none.
    """
    written = {fmt.name: fmt for fmt in FORMATS if fmt.write is not None}
    if name not in written:
        raise SaeError(f"no format '{name}' can be written; expected one of: {', '.join(written)}")
    return written[name]


def read_sae(
    path: str | Path, dtype: torch.dtype | None = torch.float32, stated: Mapping[str, Any] | None = None
) -> SaeParts:
    """Read the SAE in a folder or file, whose format its files tell; `stated` is what SAELens's registry says of it.

    Tensors are of type `dtype`, or with None of that of the files. Those of safetensors are mapped into memory, unless
    their type changes: they are read once, to check that they are finite, and again when they are used.

    Raises:
        MissingFileError: there is none, or one of its files is missing.
        SaeError: it is damaged, or cannot be computed here as its library computes it.
    """
    try:
        parts = _read(path, stated)
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise SaeError(f"no SAE can be read at '{path}': {error.strerror or error}") from None
    if dtype is None:
        return parts
    return replace(parts, tensors={name: tensor.to(dtype) for name, tensor in parts.tensors.items()})


def _read(path: str | Path, stated: Mapping[str, Any] | None) -> SaeParts:
    folder = user_path(path)
    folder.exists()  # raises for a name that no file system holds
    found = find_saes(folder)
    if len(found) > 1:
        names = ", ".join(each.name for _, each in found[:3])
        raise SaeError(f"'{path}' holds {len(found)} SAEs; name one of its files, such as {names}")
    if found:
        fmt, each = found[0]
        if fmt.config_name and not (each / fmt.config_name).is_file():
            raise MissingFileError(
                f"no SAE at '{each}': it has {fmt.weights_name(each)} but no {fmt.config_name}; copy it there"
            )
        parts = saelens.read(each, stated) if fmt is saelens.FORMAT else fmt.read(each)
        return replace(parts, format=fmt.name)
    for file in [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []:
        if file.suffix in _PICKLES:
            raise SaeError(
                f"'{file}' is a pickle, which may run code when read; expected safetensors, or the "
                f"{dictionary_learning.ARCHIVE_NAME} that dictionary_learning saves"
            )
    layouts = "; ".join(f"{fmt.name}: {fmt.layout}" for fmt in FORMATS)
    raise MissingFileError(f"no SAE at '{path}': expected a folder with the files of one of these formats. {layouts}")


__all__ = [
    "FORMATS",
    "SaeFormat",
    "SaeParts",
    "find_format",
    "find_saes",
    "is_sae",
    "natural_order",
    "read_sae",
    "walk_saes",
]
