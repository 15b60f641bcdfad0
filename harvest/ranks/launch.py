"""How this process was started: alone, or as one of several ranks. Needs no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

from ...shared.core.location import StoreUrl, staging_folder
from ...shared.store.format.layout import STAGED_FOLDER


def n_ranks() -> int:
    """Return how many processes the launcher started: `torchrun`, or another that sets its variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def quiet_network() -> None:
    """Keep the stack traces with which PyTorch's C++ logs a lost connection to itself: an error of ours says it."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when PyTorch is loaded


def needs_ranks(store: Path | StoreUrl, cache: str | None) -> bool:
    """Tell whether several processes harvest, or shards that such processes finished wait to be part of the store."""
    folder = store if isinstance(store, Path) else staging_folder(store, cache)
    return n_ranks() > 1 or (folder / STAGED_FOLDER).is_dir()
