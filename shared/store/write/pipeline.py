"""The writer's background: a pool of threads encodes chunks, one thread writes them and commits shards, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ...core.errors import ThresherError
from ..local.durable import disk_errors


class Pipeline:
    """Encode in pool threads; write the results, in the order they were submitted, in one writing thread.

    At most `pending_bytes` of rows (or one chunk, if that is larger) are pending: `encode` blocks until there is room.
    """

    def __init__(self, store: Path, threads: int, pending_bytes: int) -> None:
        self.bytes_written = 0
        self.error: BaseException | None = None
        self._store = store
        self._limit = pending_bytes
        self._pending = 0
        self._room = threading.Condition()
        self._queue: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="store-encode")
        self._writer = threading.Thread(target=self._write, name="store-write", daemon=True)
        self._writer.start()

    def encode(self, work: Callable[[], Any], then: Callable[[Any], int], cost: int) -> None:
        """Run `work()` in a pool thread, then `then(result)`, which returns bytes written, in the writing thread.

        `cost` is the bytes of rows that stay in memory until then.
        """
        with self._room:
            self._room.wait_for(lambda: not self._pending or self._pending + cost <= self._limit)
            self._pending += cost
        self.check()
        self._queue.put((self._pool.submit(work), then, cost))

    def then(self, action: Callable[[], None]) -> None:
        """Run `action()` in the writing thread after everything submitted before."""
        self.check()
        self._queue.put((None, action, 0))

    def check(self) -> None:
        """Raise the error that stopped the pipeline, if any."""
        if self.error is not None:
            if isinstance(self.error, ThresherError):
                raise type(self.error)(*self.error.args) from self.error
            raise self.error

    def close(self) -> None:
        """Wait for all work, then stop the threads; `check` raises the errors."""
        self._queue.put(None)
        self._writer.join()
        self._pool.shutdown()

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            future, then, cost = item
            try:
                with disk_errors(self._store):
                    self._run(future, then)
            except BaseException as error:  # check() raises it in the caller's thread
                self.error = self.error or error
            finally:
                with self._room:
                    self._pending -= cost
                    self._room.notify_all()

    def _run(self, future: Future[Any] | None, then: Callable[..., Any]) -> None:
        if self.error is not None:
            if future is not None:
                future.cancel()
            return
        if future is None:
            then()
        else:
            self.bytes_written += then(future.result())
