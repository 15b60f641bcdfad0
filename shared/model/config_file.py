"""How many blocks a model has, by its config.json on this machine. Needs no PyTorch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import ModelError
from .hook_points import KINDS
from .loading.packages import local_model

_N_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def likely_hook_points(model: str) -> list[str]:
    """Return the canonical hook points that a model of this number of blocks can have; which it has is measured later.

    A model is a folder, the bundled one, or an id whose config.json is in Hugging Face's cache; for others there are
    none.
    """
    return [f"blocks.{block}.{kind}" for block in range(_n_blocks(model)) for kind in KINDS]


def cached_models() -> list[str]:
    """Return the ids of the models in Hugging Face's cache."""
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in _hub_cache().glob("models--*"))


def _n_blocks(model: str) -> int:
    for path in _config_files(model):
        try:
            content: Any = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        for part in (content, content.get("text_config")) if isinstance(content, dict) else ():
            for key in _N_BLOCKS:
                if isinstance(part, dict) and isinstance(part.get(key), int):
                    return part[key]
    return 0


def _config_files(model: str) -> Iterator[Path]:
    try:
        folder = Path(local_model(model))
    except ModelError:
        return
    if folder.is_dir():
        yield folder / "config.json"
    else:
        yield from _hub_cache().glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json")


def _hub_cache() -> Path:
    """Return the folder that huggingface_hub caches in, whose import takes too long for a shell that waits."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
