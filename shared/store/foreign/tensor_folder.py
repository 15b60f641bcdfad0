"""A folder of safetensors files: each named tensor `[rows, d]` or `[contexts, context, d]` is a hook point."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...core.errors import StoreError
from ...model.hook_points import canonical_hook_point
from .safetensors_parts import TensorInfo, read_slice, tensors_of
from .source import Format, Options, Rows, Shape, chosen, dtype_name, shared_value

TOKEN_NAMES = ("tokens", "token_ids", "input_ids")
MASK_NAMES = ("mask", "attention_mask")


class TensorFolder:
    """Files in the order of their names; all of them hold the same tensors, one after another."""

    def __init__(self, path: Path, options: Options) -> None:
        files = safetensors_files(path)
        infos = [tensors_of(file) for file in files]
        shared_value("the tensors", [sorted(info) for info in infos], files)
        first = infos[0]
        floats = [name for name, info in first.items() if info.dtype.is_floating_point and len(info.shape) in (2, 3)]
        hook_points = {canonical_hook_point(name): name for name in floats}
        if not hook_points:
            raise StoreError(
                f"'{files[0]}' has no tensor of activations; expected floats of shape [rows, d] or "
                f"[contexts, context, d], got {', '.join(f'{name} {list(info.shape)}' for name, info in first.items())}"
            )
        self._names = {name: hook_points[name] for name in chosen(list(hook_points), options.hook_points, path)}
        tensors = list(self._names.values())
        self._tokens = next((name for name in TOKEN_NAMES if name in first), None)
        self._mask = next((name for name in MASK_NAMES if name in first), None)
        self._files = files
        inner = shared_value(
            "activations of shape [..., *]",
            [[info[name].shape[1:] for name in tensors] for info in infos],
            files,
        )
        rows = [self._rows(file, info, tensors) for file, info in zip(files, infos, strict=True)]
        contexts = {shape[0] for shape in inner if len(shape) == 2}
        self._context = contexts.pop() if contexts else 1
        self.shape = Shape(
            hook_points={name: shape[-1] for name, shape in zip(self._names, inner, strict=True)},
            dtype=dtype_name([info[name].dtype for info in infos for name in tensors], path),
            part_names=[file.name for file in files],
            part_rows=rows,
            context_size=self._context if len(inner[0]) == 2 else None,
            has_tokens=self._tokens is not None,
            has_mask=self._mask is not None,
            files=files,
        )

    def _rows(self, file: Path, info: dict[str, TensorInfo], tensors: list[str]) -> int:
        """Return the rows of a file; raise `StoreError` unless all its tensors have as many."""
        leading = {name: info[name].shape[:-1] for name in tensors}
        leading |= {name: info[name].shape for name in (self._tokens, self._mask) if name is not None}
        if len(set(leading.values())) > 1:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in leading.items())
            raise StoreError(f"'{file}' holds tensors of different rows ({found}); choose some with --hook_points")
        return int(np.prod(next(iter(leading.values()))))

    def read(self, part: int, start: int, stop: int) -> Rows:
        file, size = self._files[part], self._context
        first, last = start // size, -(-stop // size)
        inside = slice(start - first * size, stop - first * size)
        activations = {
            name: read_slice(file, tensor, first, last).flatten(0, -2)[inside] for name, tensor in self._names.items()
        }
        integers = {
            name: read_slice(file, name, first, last).flatten().numpy()[inside]
            for name in (self._tokens, self._mask)
            if name is not None
        }
        mask = integers.get(self._mask or "")
        return Rows(activations, integers.get(self._tokens or ""), None if mask is None else mask != 0)

    def document(self, part: int) -> np.ndarray:
        raise NotImplementedError("parts are no documents")


def safetensors_files(path: Path) -> list[Path]:
    """Return the safetensors files of a folder in order, or the file itself; raise `StoreError` if there is none."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise StoreError(f"'{path}' has no .safetensors files")
    return files


FORMAT = Format(
    "safetensors", lambda path: path.suffix == ".safetensors" or any(path.glob("*.safetensors")), TensorFolder
)
