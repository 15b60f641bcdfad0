"""Show the progress of a stage: a bar on a terminal or in a notebook, else a message every half minute."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from .logs import log_settings

SECONDS_BETWEEN_LINES = 30.0
_log = logging.getLogger(__name__)
_tqdm_init = tqdm.__init__
_hiding_lock, _n_hiding = threading.Lock(), 0


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    unit_scale: bool = False,
    disable: bool | None = None,
    delay: float = 0.0,
) -> tqdm[Any] | ProgressLines:
    """Return a tqdm bar where bars are shown, else `ProgressLines`; `disable` hides both.

    The bar appears after `delay` seconds.
    """
    settings = log_settings()
    hidden = bool(disable) or (settings is not None and settings.quiet)
    if hidden or shows_bars():
        options: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial, "delay": delay}
        bar: tqdm[Any] = _bar_class()(iterable, unit_scale=unit_scale, disable=hidden, **options)
        return bar
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # pyright: ignore[reportArgumentType]
    return ProgressLines(iterable, desc, unit, total, initial)


def shows_bars() -> bool:
    """Return whether progress is a bar: on a terminal or in a notebook, unless messages are JSON or quiet."""
    settings = log_settings()
    if settings is not None and (settings.quiet or settings.log_format == "json"):
        return False
    return sys.stderr.isatty() or in_kernel()


@contextmanager
def library_bars() -> Iterator[None]:
    """Hide the tqdm bars that other libraries make in this block, unless `progress` shows bars in this process.

    Not each of them asks its library's own settings, nor whether stderr is a terminal. Meanwhile no thread of the
    process makes a bar; bars that are there already stay.
    """
    global _n_hiding
    if shows_bars() and os.environ.get("RANK", "0") == "0":
        yield
        return
    with _hiding_lock:
        _n_hiding += 1
        tqdm.__init__ = _hidden_init  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        with _hiding_lock:
            _n_hiding -= 1
            if _n_hiding == 0:
                tqdm.__init__ = _tqdm_init


def _hidden_init(bar: tqdm[Any], *args: Any, **options: Any) -> None:
    _tqdm_init(bar, *args, **options | {"disable": True})


def in_kernel() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return "IPKernelApp" in getattr(shell, "config", {})


def _bar_class() -> type[tqdm[Any]]:
    if in_kernel() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as notebook_bar

        return notebook_bar
    return tqdm


class ProgressLines:
    """The part of tqdm's interface that the stages use, logging messages; a short loop logs none.

    A message has the fields of the bar under `progress`, for logs in JSON.
    """

    disable = False

    def __init__(self, iterable: Iterable[Any] | None, desc: str, unit: str, total: int | None, initial: int):
        self._iterable = iterable if iterable is not None else ()
        self._desc, self._unit, self._total = desc, unit, total
        self._initial = self.n = initial
        self._postfix = ""
        self._began = self._logged = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """Add to the count, and log a message if the last one was half a minute ago."""
        self.n += n
        now = time.monotonic()
        if now - self._logged >= SECONDS_BETWEEN_LINES:
            self._logged = now
            elapsed = now - self._began
            _log.info(self._line(elapsed), extra={"fields": {"progress": self._fields(elapsed)}})

    def set_postfix_str(self, postfix: str, refresh: bool = True) -> None:
        """Set the text at the end of each message."""
        self._postfix = postfix

    def _rate(self, elapsed: float) -> float:
        return (self.n - self._initial) / max(elapsed, 1e-9)

    def _seconds_left(self, elapsed: float) -> float | None:
        rate = self._rate(elapsed)
        return max(0, self._total - self.n) / rate if self._total and rate else None

    def _fields(self, elapsed: float) -> dict[str, Any]:
        left = self._seconds_left(elapsed)
        return {
            "name": self._desc,
            "done": self.n,
            "total": self._total,
            "unit": self._unit,
            "per_second": round(self._rate(elapsed), 3),
            "seconds": round(elapsed, 1),
            "seconds_left": None if left is None else round(left, 1),
            "status": self._postfix,
        }

    def _line(self, elapsed: float) -> str:
        done = tqdm.format_sizeof(self.n)
        parts = [f"{self._desc}: {done} {self._unit}s"]
        if self._total:
            parts = [
                f"{self._desc}: {done} of {tqdm.format_sizeof(self._total)} {self._unit}s ({self.n / self._total:.0%})"
            ]
        parts.append(f"{tqdm.format_sizeof(self._rate(elapsed))} {self._unit}s/s")
        left = self._seconds_left(elapsed)
        if left is not None:
            parts.append(f"{tqdm.format_interval(left)} left")
        return ", ".join([*parts, self._postfix] if self._postfix else parts)

    def close(self) -> None:
        """Do nothing: there is no bar to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
