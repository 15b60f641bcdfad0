"""SAELens's cached activations: a data set whose columns are the hook point `[context, d]` and `token_ids` `[context]`.

`CacheActivationsRunner` saves it with `save_to_disk`, or uploads it as Parquet files.
https://github.com/decoderesearch/SAELens/blob/main/sae_lens/cache_activations_runner.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import StoreError
from ...core.terminal.progress import library_bars
from ...model.hook_points import canonical_hook_point
from .source import Format, Options, Rows, Shape, chosen, dtype_name, reading_foreign

_TOKENS = "token_ids"


class CachedActivations:
    """One part: the data set's rows, each of which is a context."""

    def __init__(self, path: Path, options: Options) -> None:
        from datasets import Array2D, Dataset

        files = _files(path)
        with reading_foreign(path), library_bars():
            if (path / "state.json").is_file():
                self._data = Dataset.load_from_disk(str(path))
            else:
                self._data = Dataset.from_parquet([str(file) for file in files], streaming=False)
        features: dict[str, Any] = dict(self._data.features)  # pyright: ignore[reportAttributeAccessIssue]
        arrays = {canonical_hook_point(name): name for name, kind in features.items() if isinstance(kind, Array2D)}
        if not arrays:
            raise StoreError(
                f"'{path}' has the columns {', '.join(features)}, none of activations; expected a two-dimensional "
                "array of each context, as SAELens's CacheActivationsRunner writes it"
            )
        self._columns = {name: arrays[name] for name in chosen(list(arrays), options.hook_points, path)}
        shapes = {name: features[column].shape for name, column in self._columns.items()}
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise StoreError(f"'{path}' has columns of different context sizes: {shapes}; choose with --hook_points")
        self._context = int(next(iter(shapes.values()))[0])
        self._has_tokens = _TOKENS in features
        dtypes = [getattr(torch, features[column].dtype) for column in self._columns.values()]
        self.shape = Shape(
            hook_points={name: int(shape[1]) for name, shape in shapes.items()},
            dtype=dtype_name(dtypes, path),
            part_names=[path.name],
            part_rows=[len(self._data) * self._context],  # pyright: ignore[reportArgumentType]
            context_size=self._context,
            has_tokens=self._has_tokens,
            metadata=_model(path),
            files=files,
        )

    def read(self, part: int, start: int, stop: int) -> Rows:
        first, last = start // self._context, -(-stop // self._context)
        inside = slice(start - first * self._context, stop - first * self._context)
        with reading_foreign(self.shape.files[0]):
            table: Any = self._data.with_format("arrow")[first:last]  # pyright: ignore
            activations = {
                name: torch.from_numpy(_values(table[column]).reshape(-1, self.shape.hook_points[name])[inside].copy())
                for name, column in self._columns.items()
            }
            return Rows(activations, _values(table[_TOKENS])[inside] if self._has_tokens else None)

    def document(self, part: int) -> np.ndarray:
        raise NotImplementedError("parts are no documents")


def _values(column: Any) -> np.ndarray:
    """Return all numbers of a column of nested lists."""
    parts = []
    for chunk in column.chunks:
        chunk = getattr(chunk, "storage", chunk)
        while hasattr(chunk, "flatten") and not _is_flat(chunk):
            chunk = chunk.flatten()
        parts.append(chunk.to_numpy(zero_copy_only=False))
    return np.concatenate(parts)


def _is_flat(chunk: Any) -> bool:
    return chunk.type.num_fields == 0


def _files(path: Path) -> list[Path]:
    """Return the data files: those that `state.json` names, or all Parquet files."""
    state = path / "state.json"
    if state.is_file():
        with reading_foreign(state):
            names = [Path(entry["filename"]).name for entry in json.loads(state.read_text())["_data_files"]]
        return [path / "dataset_info.json", *(path / name for name in names)]
    return sorted(path.rglob("*.parquet"))


def _model(path: Path) -> dict[str, Any]:
    """Return the model's name from the runner's configuration, which is there in data sets from the Hub."""
    file = path / "cache_activations_runner_cfg.json"
    if not file.is_file():
        return {}
    with reading_foreign(file):
        facts = json.loads(file.read_text(encoding="utf-8"))
    return {"model": facts["model_name"]} if isinstance(facts.get("model_name"), str) else {}


FORMAT = Format(
    "saelens",
    lambda path: (
        (path / "state.json").is_file()
        or (not (path / "shards.json").exists() and path.is_dir() and any(path.rglob("*.parquet")))
    ),
    CachedActivations,
)
