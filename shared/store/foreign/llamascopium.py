"""Activation chunks of Llamascopium (Language-Model-SAEs): a folder per hook point with `chunk-N` files.

A chunk, in safetensors or PyTorch's format, holds `activation` `[contexts, context, d]` or `[rows, d]`, `tokens`,
`mask` and `attention_mask`. Rows whose `mask` or `attention_mask` is 0 are masked.
https://github.com/OpenMOSS/Language-Model-SAEs
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core.errors import StoreError
from ...model.hook_points import canonical_hook_point
from .safetensors_parts import TensorInfo, read_slice, tensors_of
from .source import Format, Options, Rows, Shape, chosen, dtype_name, reading_foreign, shared_value

_NAME = re.compile(r"(?:shard-(\d+)-)?chunk-(\d+)\.(pt|safetensors)")
_MASKS = ("mask", "attention_mask")


class Chunks:
    """Chunks in the order of their shards and numbers, the same for all hook points."""

    def __init__(self, path: Path, options: Options) -> None:
        folders = {canonical_hook_point(folder.name): folder for folder in _folders(path)}
        names = chosen(list(folders), options.hook_points, path)
        self._chunks = {name: _chunks(folders[name]) for name in names}
        listed = [[file.name.rsplit(".", 1)[0] for file in files] for files in self._chunks.values()]
        shared_value("the chunks", listed, [folders[name] for name in names])
        infos = {name: [_tensors(file) for file in files] for name, files in self._chunks.items()}
        for files, of_files in zip(self._chunks.values(), infos.values(), strict=True):
            for file, info in zip(files, of_files, strict=True):
                if "activation" not in info or len(info["activation"].shape) not in (2, 3):
                    raise StoreError(
                        f"'{file}' holds {', '.join(info)}; expected 'activation' of shape [contexts, context, d] "
                        "or [rows, d]"
                    )
        shapes = {name: [info["activation"].shape for info in found] for name, found in infos.items()}
        widths = {
            name: shared_value("activations of shape [..., *]", [shape[1:] for shape in found], self._chunks[name])
            for name, found in shapes.items()
        }
        first = names[0]
        for name in names[1:]:
            for file, mine, other in zip(self._chunks[name], shapes[name], shapes[first], strict=True):
                if mine[:-1] != other[:-1]:
                    raise StoreError(f"'{file}' has rows {list(mine[:-1])}, but '{first}' has {list(other[:-1])}")
        inner = widths[first]
        self._context = inner[0] if len(inner) == 2 else 1
        present = set(infos[first][0])
        self._masks = [name for name in _MASKS if name in present]
        self._has_tokens = "tokens" in present
        self.shape = Shape(
            hook_points={name: shape[-1] for name, shape in widths.items()},
            dtype=dtype_name([info["activation"].dtype for found in infos.values() for info in found], path),
            part_names=[file.name for file in self._chunks[first]],
            part_rows=[int(np.prod(shape[:-1])) for shape in shapes[first]],
            context_size=inner[0] if len(inner) == 2 else None,
            has_tokens=self._has_tokens,
            has_mask=bool(self._masks),
            files=sorted(file for files in self._chunks.values() for file in files),
        )

    def read(self, part: int, start: int, stop: int) -> Rows:
        first, last = start // self._context, -(-stop // self._context)
        inside = slice(start - first * self._context, stop - first * self._context)
        files = {name: chunks[part] for name, chunks in self._chunks.items()}
        activations = {
            name: _read(file, "activation", first, last).flatten(0, -2)[inside] for name, file in files.items()
        }
        tokens = self._tokens(files, first, last, inside) if self._has_tokens else None
        file = next(iter(files.values()))
        usable = np.ones(stop - start, bool)
        for name in self._masks:
            usable &= _read(file, name, first, last).flatten().numpy()[inside] != 0
        return Rows(activations, tokens, usable if self._masks else None)

    def _tokens(self, files: dict[str, Path], first: int, last: int, inside: slice) -> np.ndarray:
        """Return the tokens of some rows; raise `StoreError` unless all hook points hold the same ones."""
        found = {file: _read(file, "tokens", first, last).flatten().numpy()[inside] for file in files.values()}
        one, *others = found.items()
        for file, tokens in others:
            if not np.array_equal(tokens, one[1]):
                raise StoreError(f"'{file}' and '{one[0]}' hold different tokens; import their hook points separately")
        return one[1]

    def document(self, part: int) -> np.ndarray:
        raise NotImplementedError("parts are no documents")


def _folders(path: Path) -> list[Path]:
    """Return the folders of hook points: the path itself if it holds chunks, else the sub-folders that do."""
    if _chunks(path):
        return [path]
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and _chunks(folder))


def _chunks(folder: Path) -> list[Path]:
    found = [(match, file) for file in folder.iterdir() if (match := _NAME.fullmatch(file.name))]
    return [file for _, file in sorted(found, key=lambda item: (int(item[0][1] or 0), int(item[0][2])))]


def _tensors(file: Path) -> dict[str, TensorInfo]:
    if file.suffix == ".safetensors":
        return tensors_of(file)
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in _loaded(file).items()}


def _read(file: Path, name: str, start: int, stop: int) -> Tensor:
    return read_slice(file, name, start, stop) if file.suffix == ".safetensors" else _loaded(file)[name][start:stop]


@lru_cache(maxsize=2)
def _loaded(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a PyTorch file, read without running code from it."""
    with reading_foreign(file):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: value for name, value in content.items() if isinstance(value, Tensor)}


FORMAT = Format("llamascopium", lambda path: path.is_dir() and bool(_folders(path)), Chunks)
