"""saev's shards, protocols 1.0 to 2.1: two JSON files, and float32 files `[examples, layers, tokens, d]`.

https://github.com/OSU-NLP-Group/saev/blob/main/docs/src/developers/protocol.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import StoreError
from .source import Format, Options, Rows, Shape, chosen, reading_foreign

_ITEM_BYTES = 4


class Shards:
    """Shards in the order of `shards.json`; a context is an example with all its tokens, the class token first."""

    def __init__(self, path: Path, options: Options) -> None:
        with reading_foreign(path / "metadata.json"):
            facts: dict[str, Any] = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        with reading_foreign(path / "shards.json"):
            listed: list[dict[str, Any]] = json.loads((path / "shards.json").read_text(encoding="utf-8"))
        if facts.get("dtype", "float32") != "float32":
            raise StoreError(f"'{path}/metadata.json' states dtype {facts['dtype']!r}; expected float32")
        with reading_foreign(path / "metadata.json"):
            content = _first(facts, "content_tokens_per_example", "patches_per_ex", "n_patches_per_img")
            self._tokens = content + bool(facts["cls_token"])
            self._layers: list[int] = list(facts["layers"])
            self._width: int = _first(facts, "d_model", "d_vit")
        with reading_foreign(path / "shards.json"):
            self._files = [path / Path(entry["name"]).name for entry in listed]
            self._examples = [_first(entry, "n_examples", "n_ex", "n_imgs") for entry in listed]
        for file, n in zip(self._files, self._examples, strict=True):
            least = n * len(self._layers) * self._tokens * self._width * _ITEM_BYTES
            size = file.stat().st_size if file.is_file() else -1
            if size < least:
                found = "it is not there" if size < 0 else f"it has {size:,}"
                raise StoreError(f"'{file}' should have {least:,} bytes for {n} examples, but {found}")
        names = {_hook_point(layer): place for place, layer in enumerate(self._layers)}
        self._places = {name: names[name] for name in chosen(list(names), options.hook_points, path)}
        self.shape = Shape(
            hook_points=dict.fromkeys(self._places, self._width),
            dtype="float32",
            part_names=[file.name for file in self._files],
            part_rows=[n * self._tokens for n in self._examples],
            context_size=self._tokens,
            one_document_each=True,
            metadata={"model": facts["ckpt"]} if "ckpt" in facts else {},
            files=[path / "metadata.json", path / "shards.json", *self._files],
        )

    def read(self, part: int, start: int, stop: int) -> Rows:
        shape = (self._examples[part], len(self._layers), self._tokens, self._width)
        first, last = start // self._tokens, -(-stop // self._tokens)
        inside = slice(start - first * self._tokens, stop - first * self._tokens)
        with reading_foreign(self._files[part]):
            shard = np.memmap(self._files[part], "<f4", "r", shape=shape)[first:last]
            return Rows(
                {
                    name: torch.from_numpy(shard[:, place].reshape(-1, self._width)[inside].copy())
                    for name, place in self._places.items()
                }
            )

    def document(self, part: int) -> np.ndarray:
        raise NotImplementedError("parts are no documents")


def _first(table: dict[str, Any], *keys: str) -> int:
    """Return the value of the first key that is there: names changed between protocol versions."""
    for key in keys:
        if key in table:
            return int(table[key])
    raise StoreError(f"expected the key {' or '.join(keys)}, got {', '.join(table)}")


def _hook_point(layer: int) -> str:
    return f"blocks.{layer}.resid_post" if layer >= 0 else f"layer.{layer}"


FORMAT = Format("saev", lambda path: (path / "shards.json").is_file() and (path / "metadata.json").is_file(), Shards)
