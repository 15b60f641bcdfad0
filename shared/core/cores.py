"""Work side by side on a CPU's cores, with every operator on one thread.

Threads inside an operator wait for the slowest of them at every operator, and between operators they spin on cores
that others could use. Work side by side waits only at its end, and as every operator runs on one thread, its
rounding does not depend on how many cores there are.
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
    """Within this context, operators of this thread and of new ones run on one thread each; yield how many did."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def on_cores(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return `work(item)` for every item, without gradients, on as many cores as operators have threads.

    Work may itself ask for work on cores. Which core takes which item is left open, so items must not depend on one
    another. An error ends the work and is raised here, once what had begun has ended.
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
    """Cut n items into as few blocks of nearly equal size as hold at most so many each."""
    n_blocks = max(1, -(-n // most))
    return [slice(n * i // n_blocks, n * (i + 1) // n_blocks) for i in range(n_blocks)]


def by_blocks(work: Callable[[slice], Result], n: int, most: int = 512) -> list[Result]:
    """Do work on n rows block by block on cores; return what it did on each, in order."""
    return on_cores(work, even_blocks(n, most))


def joined(blocks: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the tensors that work on each block returned, each of all blocks in one."""
    return tuple(torch.cat(tensors) for tensors in zip(*blocks, strict=True))


class _Here(threading.local):
    """Whether this thread is at work as a core, of how many, and within which work of another thread."""

    is_core = False
    n_cores = 1
    asked: _Shared | None = None


_here = _Here()


class _Shared:
    """Items that cores take in turn; the first error ends the work.

    Who asked for it, if it is not itself within other work, helps when nothing is left to begin with what its items
    ask for: `calls` brings that, and None at the end.
    """

    def __init__(self, work: Callable[[Any], Any], items: Sequence[Any], n_cores: int) -> None:
        self.n_cores = n_cores
        self.within = _here.asked
        self.calls: SimpleQueue[_Shared | None] = SimpleQueue()
        self._results: list[Any] = [None] * len(items)
        self._work, self._items, self._n = work, items, len(items)
        self._next, self._ended = count(), count(1)  # counting takes no lock, which an interrupt could end
        self._error: BaseException | None = None

    def take_part(self) -> None:
        """Work on items until none is left to begin."""
        while (i := next(self._next)) < self._n:
            try:
                if self._error is None:
                    self._results[i] = self._work(self._items[i])
            except BaseException as error:  # raised where the work was asked for
                self._error = self._error or error
            finally:
                if next(self._ended) == self._n:
                    self.calls.put(None)

    def wait(self) -> list[Any]:
        """Wait for items that others have begun; return all results, or raise the error that ended the work."""
        while (shared := self.calls.get()) is not None:
            shared.take_part()
        results, error = self._results, self._error
        # Neither who is called too late nor an error's traceback must keep what is here.
        del self._results, self._work, self._items, self._error
        if error is None:
            return results
        try:
            raise error
        finally:
            del results, error


class _Helpers:
    """Threads that wait for work to take part in, whoever asks for it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._queue: SimpleQueue[_Shared | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        atexit.register(self._end)

    def call(self, shared: _Shared, n_helpers: int) -> None:
        """Ask threads to take part, and who waits for work that this is within; who comes late finds nothing to do."""
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
        # Asking is what makes PyTorch settle the number for this thread; at its first operator another may have it.
        torch.set_num_threads(1)
        torch.get_num_threads()
        ready.set()
        with torch.no_grad():
            while (shared := self._queue.get()) is not None:
                _here.is_core, _here.n_cores, _here.asked = True, shared.n_cores, shared.within or shared
                shared.take_part()
                _here.asked = None
                del shared

    def _end(self) -> None:
        """Let the threads end before the interpreter does, for it stops them wherever they are, and may crash."""
        if self.process == os.getpid():
            for _ in self._threads:
                self._queue.put(None)
            for thread in self._threads:
                thread.join()


_helpers = _Helpers()

# In a forked process PyTorch's first caller makes its pool of threads anew, and a second at that moment finds none.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


def _run(work: Callable[[Any], Any], items: Sequence[Any], n_cores: int) -> list[Any]:
    global _helpers
    if len(items) < 2 or n_cores < 2:
        return [work(item) for item in items]
    if _helpers.process != os.getpid():
        _helpers = _Helpers()
    shared = _Shared(work, items, n_cores)
    _helpers.call(shared, min(n_cores, len(items)) - 1)
    shared.take_part()
    return shared.wait()
