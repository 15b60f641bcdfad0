"""Shuffled batches from an activation store: independent of timing, and resumable at any position."""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.core.compute.device import choose_device, make_current, numbered
from ...shared.core.errors import ConfigError, HookPointError, StoreError
from ...shared.model.hook_points import canonical_hook_point
from .gpu_windows import Staging, WindowRows, take_rows, used_here
from .order import ORDER_VERSION, Epoch, epoch_and_row, order_epoch, place_window
from .row_mask import Half, TrainingRowMask
from .window_memory import WindowBuffers

if TYPE_CHECKING:
    from ...shared.store import ActivationStore

_WINDOWS_IN_MEMORY = 2


class Window(NamedTuple):
    """Decoded chunks, and the order of their training rows; None if the rows are already in order."""

    rows: dict[str, WindowRows]
    order: Tensor | None


class ShuffledBatches:
    """Iterator over a store's training rows, epoch after epoch.

    Each batch is a dict from hook point to `[batch, d_in]` in the store's dtype; all hook points of a batch have the
    same tokens. Held-out contexts, masked tokens and rows of roles other than those the store was opened with never
    appear. Batches continue across the ends of windows and epochs, so no row is dropped or repeated. The state is the
    number of rows taken so far. With several ranks, each takes its slice of every batch of the same stream.

    On the CPU, a batch is a view of its window. Copy rows that you keep for long, because a view keeps the whole
    window's memory in use, and do not write to a batch.

    Args:
        store: the store to read.
        hook_points: hook points to read (default: all).
        batch_size: rows per batch, over all ranks.
        seed: seed of the order.
        device: device of the batches; with a GPU, windows are kept and rows gathered there.
        window_bytes: limit on the memory of decoded activations per hook point; a larger window shuffles better. The
            order depends on it, but not on which hook points are read.
        rank: this process's rank.
        world_size: number of ranks.
        n_rows: number of rows after which the stream ends, so that nothing beyond is decoded (default: no end).
        documents: half of the documents to take rows of (default: all).

    Raises:
        HookPointError: the store does not have one of the hook points.
        ConfigError: a number is out of bounds, or the device is not available.
        StoreError: the store has no training rows.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_points: Sequence[str] | None = None,
        batch_size: int = 4096,
        seed: int = 0,
        device: str | torch.device = "cpu",
        *,
        window_bytes: int = 2 << 30,
        rank: int = 0,
        world_size: int = 1,
        n_rows: int | None = None,
        documents: Half | None = None,
    ):
        names = [canonical_hook_point(name) for name in hook_points or store.hook_points]
        for name in names:
            if name not in store.hook_points:
                raise HookPointError(
                    f"no hook point '{name}' in store '{store.path}'; it has: {', '.join(store.hook_points)}"
                )
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("window_bytes", window_bytes, 0),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
        ):
            if not isinstance(value, numbers.Integral) or value < least:
                raise ConfigError(f"{key}: expected an integer of at least {least}, got {value!r}")
        if rank >= world_size:
            raise ConfigError(f"rank is {rank}, expected less than the world_size of {world_size}")
        if batch_size % world_size:
            raise ConfigError(f"batch_size is {batch_size}, expected a multiple of the {world_size} ranks")
        self.store = store
        self.hook_points = tuple(dict.fromkeys(names))
        self.batch_size = batch_size
        self.seed = seed
        self.device = numbered(choose_device(str(device)))
        self.window_bytes = window_bytes
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._usable = TrainingRowMask(store, documents)
        self._rows_per_chunk = self._usable.rows_per_chunk()
        self.rows_per_epoch = int(self._rows_per_chunk.sum())
        if not self.rows_per_epoch:
            raise StoreError(no_training_rows(store, documents))
        self._rows_taken = 0
        self._end = sys.maxsize if n_rows is None else n_rows
        self._epochs: dict[int, Epoch] = {}
        self._windows: dict[tuple[int, int], Future[Window]] = {}
        self._buffers: dict[str, WindowBuffers] = {}
        self._staging = Staging(store, self.device) if self.device.type != "cpu" else None
        # Pinned memory belongs to the current device, which is set per thread.
        self._decoder = ThreadPoolExecutor(1, "decode-window", make_current, (str(self.device),))
        self._orderers = ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="order-window")

    def __iter__(self) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
        return self

    def __next__(self) -> dict[str, Float[Tensor, "batch d_in"]]:
        if self._rows_taken + self.batch_size > self._end:
            raise StopIteration
        first = self._rows_taken + self._slice.start
        batch = self._gather(first, self._slice.stop - self._slice.start)
        self._rows_taken += self.batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the state: the number of rows taken, the seed, and the version of the order."""
        return {"rows_taken": self._rows_taken, "seed": self.seed, "order": ORDER_VERSION}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position in the stream.

        Raises:
            ConfigError: the state is from a stream with another seed, or from a release with another order.
        """
        if state["seed"] != self.seed:
            raise ConfigError(f"the saved stream has seed {state['seed']}, this one {self.seed}; use the same")
        version = state.get("order", 1)
        if version != ORDER_VERSION:
            raise ConfigError(
                f"the saved stream has rows in order version {version}, this release uses version {ORDER_VERSION}, so "
                "some rows would repeat; resume with the release that saved it, or train again in another output"
            )
        self._rows_taken = int(state["rows_taken"])

    def close(self) -> None:
        """Stop the thread that decodes ahead."""
        self._windows.clear()
        self._buffers.clear()
        self._decoder.shutdown(wait=True, cancel_futures=True)
        self._orderers.shutdown()

    def __enter__(self) -> ShuffledBatches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _chunks_per_window(self) -> int:
        widest = max(self.store.d_in(name) for name in self.store.hook_points)
        chunk_bytes = self.store.chunk_rows * widest * self.store.dtype.itemsize
        return max(1, self.window_bytes // (_WINDOWS_IN_MEMORY * chunk_bytes))

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs = {old: order for old, order in self._epochs.items() if abs(old - epoch) <= 1}
            self._epochs[epoch] = order_epoch(self._rows_per_chunk, self._chunks_per_window(), self.seed, epoch)
        return self._epochs[epoch]

    def _gather(self, position: int, n_rows: int) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        while n_rows:
            epoch, row = epoch_and_row(position, self.rows_per_epoch)
            starts = self._epoch(epoch).row_starts
            index = int(np.searchsorted(starts, row, side="right")) - 1
            first = row - int(starts[index])
            n_taken = min(n_rows, int(starts[index + 1]) - row)
            parts.append(_take(self._window(epoch, index), slice(first, first + n_taken)))
            if first:
                self._decode_ahead(epoch, index)
            position += n_taken
            n_rows -= n_taken
        return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _window(self, epoch: int, index: int) -> Window:
        """Return one window, and drop all others except the next one."""
        places = (epoch, index), self._after(epoch, index)
        self._windows = {place: window for place, window in self._windows.items() if place in places}
        if places[0] not in self._windows:
            self._windows[places[0]] = self._decoder.submit(self._decode, epoch, index)
        return self._windows[places[0]].result()

    def _decode_ahead(self, epoch: int, index: int) -> None:
        """Start to decode the window after this one.

        This waits until the window's second batch is taken. Until then, the consumer may still hold the last batch of
        the window before, and thus the memory that is about to be reused.
        """
        after = self._after(epoch, index)
        if after not in self._windows and self._n_wanted(*after):
            self._windows[after] = self._decoder.submit(self._decode, *after)

    def _after(self, epoch: int, index: int) -> tuple[int, int]:
        return (epoch, index + 1) if index + 1 < self._epoch(epoch).n_windows else (epoch + 1, 0)

    def _n_wanted(self, epoch: int, index: int) -> int:
        """Return how many of a window's rows are before the end of the stream."""
        starts = self._epoch(epoch).row_starts
        return int(
            np.clip(self._end - epoch * self.rows_per_epoch - starts[index], 0, starts[index + 1] - starts[index])
        )

    def _decode(self, epoch: int, index: int) -> Window:
        """Read a window: for a GPU, its chunks and the order of their rows; for a CPU, its rows in order.

        On a CPU, each row is copied once, from the decoded chunk to its position, and batches are views. Chunks without
        rows before the end of the stream are not read.
        """
        chunks = self._epochs[epoch].window(index)
        n_rows = self._rows_per_chunk[chunks]
        places = place_window(n_rows, self.seed, epoch, index, self._orderers.map)
        usable = self._usable.of(chunks).reshape(-1) if n_rows.min() < self.store.chunk_rows else None
        if self._staging is not None:
            rows = {name: self._staging.read_chunks(name, chunks) for name in self.hook_points}
            order = np.empty_like(places)
            order[places] = np.arange(len(places)) if usable is None else np.flatnonzero(usable)
            return Window(rows, self._staging.to_device(torch.from_numpy(order)))
        if usable is not None:
            of_training, places = places, np.full(len(usable), -1, dtype=np.int64)
            places[usable] = of_training
        n = self._n_wanted(epoch, index)
        if n < n_rows.sum():
            by_chunk = np.where(places < n, places, -1).reshape(len(chunks), -1)
            wanted = (by_chunk >= 0).any(axis=1)
            chunks, places = chunks[wanted], by_chunk[wanted].reshape(-1)
        return Window({name: self._ordered(name, chunks, places, n) for name in self.hook_points}, None)

    def _ordered(self, hook_point: str, chunks: np.ndarray, places: np.ndarray, n_rows: int) -> Tensor:
        """Return a window's rows of a hook point, in order."""
        d_in = self.store.d_in(hook_point)
        if hook_point not in self._buffers:
            n_chunks = min(self._chunks_per_window(), len(self._rows_per_chunk))
            n_bytes = (n_chunks * self.store.chunk_rows + 1) * d_in * self.store.dtype.itemsize
            self._buffers[hook_point] = WindowBuffers(n_bytes, _WINDOWS_IN_MEMORY)
        rows = self._buffers[hook_point].take((n_rows + 1, d_in), self.store.dtype)
        self.store.place_rows(hook_point, chunks, places, rows)
        return rows[:n_rows]


def no_training_rows(store: ActivationStore, documents: Half | None) -> str:
    """Return the message of an error: no row can be trained on."""
    of = "" if documents is None else f" in documents of {documents} number"
    return f"store '{store.path}' has no training rows{of}; all are held out or masked"


def _take(window: Window, part: slice) -> dict[str, Tensor]:
    """Return rows of a window in order; views if the window's rows are already in order."""
    if window.order is None:
        return {name: rows[part] for name, rows in window.rows.items() if isinstance(rows, Tensor)}
    for tensor in (*window.rows.values(), window.order):
        used_here(tensor)
    return {name: take_rows(rows, window.order[part]) for name, rows in window.rows.items()}
