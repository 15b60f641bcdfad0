"""Save an SAE's progress through the store, so that a pass that was killed can resume."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...shared.core.disk import replacing, writing

SECONDS_BETWEEN = 60.0
SHARE_OF_TIME = 0.05


class Pace:
    """Decides when to save progress: once a minute, or less often so that saving takes at most 5% of the time."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Return whether it is time to save again."""
        return time.monotonic() - self._last >= max(SECONDS_BETWEEN, self._cost / SHARE_OF_TIME)

    def saved(self, started: float) -> None:
        """Record that a save began at `started` and has just ended."""
        self._last = time.monotonic()
        self._cost = self._last - started


def progress_path(index: Path) -> Path:
    """Return the path of the progress file beside an index."""
    return index.with_name(f".{index.stem}.progress")


def save_progress(path: Path, fingerprint: str, n_blocks: int, parts: Mapping[str, Any]) -> None:
    """Write the arrays and numbers among the attributes of `parts`, and the number of blocks that they cover."""
    arrays = {
        f"{name}.{key}": np.ascontiguousarray(value) for name, part in parts.items() for key, value in _plain(part)
    }
    described = {"fingerprint": fingerprint, "n_blocks": str(n_blocks), "checksum": _checksum(arrays)}
    with replacing(path) as partial:
        save_file(arrays, partial, described)


def restore_progress(path: Path, fingerprint: str, parts: Mapping[str, Any]) -> int:
    """Restore `parts` from progress with the same fingerprint; return the number of blocks covered, or 0 if none."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "numpy") as kept:
            header = kept.metadata()
            if header["fingerprint"] != fingerprint:
                return 0
            loaded = {
                (name, key): (kept.get_tensor(f"{name}.{key}"), isinstance(value, np.ndarray))
                for name, part in parts.items()
                for key, value in _plain(part)
            }
    except (OSError, SafetensorError, KeyError):
        return 0
    if header.get("checksum") != _checksum({f"{name}.{key}": value for (name, key), (value, _) in loaded.items()}):
        return 0
    for (name, key), (value, is_array) in loaded.items():
        setattr(parts[name], key, value if is_array else value.item())
    return int(header["n_blocks"])


def remove_progress(index: Path) -> None:
    """Remove the progress beside a finished index, including a partial file left by a killed run."""
    path = progress_path(index)
    with writing(path):
        for file in (path, _partial(path)):
            file.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a checksum of arrays; safetensors stores none of its own."""
    total = 0
    for name, value in sorted(arrays.items()):
        content = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        total = zlib.crc32(content, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _plain(part: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in vars(part).items() if isinstance(value, np.ndarray | int | float)]
