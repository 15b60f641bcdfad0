"""Chunk buffers that are used again: fresh memory costs a page fault for every 4 KiB of it."""

from __future__ import annotations

import threading

import numpy as np


class ChunkBuffers:
    """Free buffers by shape and type; there are never more than were once in use together."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, int], np.dtype], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """Return a buffer of any content."""
        with self._lock:
            free = self._free.get((shape, dtype))
            return free.pop() if free else np.empty(shape, dtype)

    def give_back(self, buffer: np.ndarray) -> None:
        """Take back a buffer that nothing reads any more."""
        with self._lock:
            self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)
