"""Run independent pieces of work in parallel on a CPU's cores, each with single-threaded operators.

The threads of a parallel operator wait for the slowest one at every operator, and spin on their cores between
operators. Independent pieces of work wait only once, at the end. With single-threaded operators, rounding does not
depend on the number of cores.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def single_threaded_operators() -> Iterator[int]:
    """Run operators single-threaded within this context, also in new threads; yield the earlier number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def on_cores(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return `work(item)` for every item, without gradients, on as many cores as PyTorch has threads.

    `work` may itself call `on_cores`. Items run in any order on any core, so they must not depend on each other. After
    an error no further items start, and the error is raised once the running ones have ended.
    """
    if _here.is_core:
        return _run(work, items, _here.n_cores)
    with single_threaded_operators() as n_cores, torch.no_grad():
        _here.is_core, _here.n_cores = True, n_cores
        try:
            return _run(work, items, n_cores)
        finally:
            _here.is_core = False


def even_blocks(n: int, most: int) -> list[slice]:
    """Divide n items into the fewest blocks of nearly equal size with at most `most` items each."""
    n_blocks = max(1, -(-n // most))
    return [slice(n * i // n_blocks, n * (i + 1) // n_blocks) for i in range(n_blocks)]


def by_blocks(work: Callable[[slice], Result], n: int, most: int = 512) -> list[Result]:
    """Call `work` on blocks of n rows in parallel; return the results in order."""
    return on_cores(work, even_blocks(n, most))


def joined(blocks: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the blocks' results, tensor by tensor."""
    return tuple(torch.cat(tensors) for tensors in zip(*blocks, strict=True))


class _Here(threading.local):
    """Per thread: whether it runs items, on how many cores, and the outermost work it is helping with."""

    is_core = False
    n_cores = 1
    outermost: _Shared | None = None


_here = _Here()


class _Shared:
    """Items that several threads take in turn; the first error ends the work.

    The outermost caller, once it has no items left to start, helps with nested work. `calls` delivers that work, then
    None when all is done.
    """

    def __init__(self, work: Callable[[Any], Any], items: Sequence[Any], n_cores: int) -> None:
        self.n_cores = n_cores
        self.within = _here.outermost
        self.calls: SimpleQueue[_Shared | None] = SimpleQueue()
        self._results: list[Any] = [None] * len(items)
        self._work, self._items, self._n = work, items, len(items)
        self._next, self._ended = count(), count(1)  # counting needs no lock that an interrupt could leave held
        self._error: BaseException | None = None

    def run_items(self) -> None:
        """Run items until none is left to start."""
        while (i := next(self._next)) < self._n:
            try:
                if self._error is None:
                    self._results[i] = self._work(self._items[i])
            except BaseException as error:  # raised by `wait` in the calling thread
                self._error = self._error or error
            finally:
                if next(self._ended) == self._n:
                    self.calls.put(None)

    def wait(self) -> list[Any]:
        """Wait for items running in other threads; return all results, or raise the first error."""
        while (shared := self.calls.get()) is not None:
            shared.run_items()
        results, error = self._results, self._error
        # Drop these references so that neither a late helper nor a traceback keeps the results alive.
        del self._results, self._work, self._items, self._error
        if error is None:
            return results
        try:
            raise error
        finally:
            del results, error


class _Helpers:
    """A pool of threads that help with any work."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._queue: SimpleQueue[_Shared | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        atexit.register(self._end)

    def call(self, shared: _Shared, n_helpers: int) -> None:
        """Ask helper threads, and the caller of the enclosing work, to help; a late helper finds no items left."""
        with self._lock:
            while len(self._threads) < n_helpers:
                ready = threading.Event()
                self._threads.append(threading.Thread(target=self._serve, args=(ready,), name="core", daemon=True))
                self._threads[-1].start()
                ready.wait()
        for _ in range(n_helpers):
            self._queue.put(shared)
        if shared.within is not None:
            shared.within.calls.put(shared)

    def _serve(self, ready: threading.Event) -> None:
        # Reading the number makes PyTorch fix it for this thread; otherwise its first operator may use another one.
        torch.set_num_threads(1)
        torch.get_num_threads()
        ready.set()
        with torch.no_grad():
            while (shared := self._queue.get()) is not None:
                _here.is_core, _here.n_cores, _here.outermost = True, shared.n_cores, shared.within or shared
                shared.run_items()
                _here.outermost = None
                del shared

    def _end(self) -> None:
        """End the threads before the interpreter exits, which would stop them anywhere and could crash."""
        if self.process == os.getpid():
            for _ in self._threads:
                self._queue.put(None)
            for thread in self._threads:
                thread.join()


_helpers = _Helpers()

# After a fork, the first operator recreates PyTorch's thread pool; a second one at that moment would find none.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


def _run(work: Callable[[Any], Any], items: Sequence[Any], n_cores: int) -> list[Any]:
    global _helpers
    if len(items) < 2 or n_cores < 2:
        return [work(item) for item in items]
    if _helpers.process != os.getpid():
        _helpers = _Helpers()
    shared = _Shared(work, items, n_cores)
    _helpers.call(shared, min(n_cores, len(items)) - 1)
    shared.run_items()
    return shared.wait()
