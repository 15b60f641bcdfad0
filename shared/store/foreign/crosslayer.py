"""HDF5 chunks of crosslayer-coding: `chunk_N.h5` with `layer_L/inputs` and `layer_L/targets`, `[rows, d]`.

bfloat16 is kept as uint16. Rows are shuffled within a chunk, and recent versions of its writer shuffle every layer on
its own, so that row `r` of two layers may belong to different tokens.
https://github.com/curt-tigges/crosslayer-coding
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ConfigError, StoreError
from .source import Format, Options, Rows, Shape, chosen, dtype_name, reading_foreign, shared_value

_NAME = re.compile(r"chunk_(\d+)\.(?:h5|hdf5)")
_SIDES = {"inputs": "mlp_in", "targets": "mlp_out"}


class Hdf5Chunks:
    """Chunks in the order of their numbers; layer `L` is `blocks.L.mlp_in` and `blocks.L.mlp_out`."""

    def __init__(self, path: Path, options: Options) -> None:
        self._files = _files(path)
        found = [_datasets(file) for file in self._files]
        shared_value("the layers", [sorted(file) for file in found], self._files)
        names = chosen(sorted(found[0], key=_by_layer), options.hook_points, path)
        layers = {name.split(".")[1] for name in names}
        if len(layers) > 1 and not options.aligned:
            one = ",".join(name for name in names if name.split(".")[1] == names[0].split(".")[1])
            raise StoreError(
                f"'{path}' holds {len(layers)} layers, and recent versions of crosslayer-coding shuffle the rows of "
                f"each layer on its own; import one layer (--hook_points {one}), or say --aligned true if yours were "
                "shuffled together"
            )
        self._keys = {name: found[0][name][0] for name in names}
        widths = shared_value("the widths", [[file[name][1][1] for name in names] for file in found], self._files)
        rows = []
        for file, entries in zip(self._files, found, strict=True):
            counts = {entries[name][1][0] for name in names}
            if len(counts) > 1:
                raise StoreError(f"'{file}' has layers of {sorted(counts)} rows; expected the same number in all")
            rows.append(counts.pop())
        self.shape = Shape(
            hook_points=dict(zip(names, widths, strict=True)),
            dtype=dtype_name([entries[name][2] for entries in found for name in names], path),
            part_names=[file.name for file in self._files],
            part_rows=rows,
            metadata=_model(path),
            files=self._files,
        )

    def read(self, part: int, start: int, stop: int) -> Rows:
        file = self._files[part]
        with reading_foreign(file):
            return Rows({name: _tensor(_opened(file)[key][start:stop]) for name, key in self._keys.items()})

    def document(self, part: int) -> np.ndarray:
        raise NotImplementedError("parts are no documents")


def _files(path: Path) -> list[Path]:
    found = [(match, file) for file in path.iterdir() if (match := _NAME.fullmatch(file.name))]
    return [file for _, file in sorted(found, key=lambda item: int(item[0][1]))]


def _datasets(file: Path) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    """Return the key, shape and data type of each hook point in a file."""
    found = {}
    with reading_foreign(file):
        for group, content in _opened(file).items():
            match = re.fullmatch(r"layer_(\d+)", group)
            for side, kind in _SIDES.items():
                if match and side in content:
                    dataset = content[side]
                    dtype = _tensor(np.empty(0, dataset.dtype)).dtype
                    found[f"blocks.{match[1]}.{kind}"] = (f"{group}/{side}", dataset.shape, dtype)
    if not found:
        raise StoreError(f"'{file}' has no layer_N/inputs or layer_N/targets; expected a chunk of crosslayer-coding")
    return found


def _tensor(values: np.ndarray) -> Tensor:
    if values.dtype == np.uint16:  # bfloat16, which HDF5 does not have
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _by_layer(name: str) -> tuple[int, str]:
    return int(name.split(".")[1]), name


def _model(path: Path) -> dict[str, Any]:
    file = path / "metadata.json"
    if not file.is_file():
        return {}
    with reading_foreign(file):
        facts = json.loads(file.read_text(encoding="utf-8"))
        return {"model": facts["model_name"]} if "model_name" in facts else {}


@lru_cache(maxsize=16)
def _opened(file: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise ConfigError(f"'{file}' is an HDF5 file, which needs h5py: pip install 'thresher[hdf5]'") from None
    return h5py.File(file, "r")


FORMAT = Format("crosslayer-coding", lambda path: path.is_dir() and bool(_files(path)), Hdf5Chunks)
