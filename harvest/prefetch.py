"""Run an iterator in a thread, a few items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

_T = TypeVar("_T")
_END = object()


class Prefetch(Generic[_T]):
    """Iterate over `items` through a queue of at most `depth` items that a thread fills.

    An exception in the iterator is raised in place of its item. Leaving the context stops the thread after the current
    item.
    """

    def __init__(self, items: Iterator[_T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[object] = queue.Queue(depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Iterator[_T]:
        self._thread.start()
        return self._drain()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _fill(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._error = error
        self._queue.put(_END)

    def _drain(self) -> Iterator[_T]:
        while (item := self._queue.get()) is not _END:
            yield item  # pyright: ignore[reportReturnType]
        if self._error is not None:
            raise self._error
