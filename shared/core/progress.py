"""Show the progress of a stage: a bar on a terminal or in a notebook, or lines half a minute apart (in a log file)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


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
    """Return a tqdm bar, or `ProgressLines` without a terminal or a notebook; `disable` hides both.

    The bar appears after `delay` seconds. In a notebook with ipywidgets it is a widget.
    """
    if disable or in_kernel() or sys.stderr.isatty():
        options: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial, "delay": delay}
        bar: tqdm[Any] = _bar_class()(iterable, unit_scale=unit_scale, disable=bool(disable), **options)
        return bar
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # pyright: ignore[reportArgumentType]
    return ProgressLines(iterable, desc, unit, total, initial)


def in_kernel() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def _bar_class() -> type[tqdm[Any]]:
    if not in_kernel() or find_spec("ipywidgets") is None:
        return tqdm
    from tqdm.notebook import tqdm as notebook_bar

    return notebook_bar


class ProgressLines:
    """The part of tqdm's interface that the stages use, printing lines to stderr; a short loop prints none."""

    disable = False

    def __init__(self, iterable: Iterable[Any] | None, desc: str, unit: str, total: int | None, initial: int):
        self._iterable = iterable if iterable is not None else ()
        self._desc, self._unit, self._total = desc, unit, total
        self._initial = self.n = initial
        self._postfix = ""
        self._began = self._printed = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """Add to the count, and print a line if the last one was half a minute ago."""
        self.n += n
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def set_postfix_str(self, postfix: str, refresh: bool = True) -> None:
        """Set the text at the end of each line."""
        self._postfix = postfix

    def _line(self, elapsed: float) -> str:
        rate = (self.n - self._initial) / max(elapsed, 1e-9)
        done = tqdm.format_sizeof(self.n)
        parts = [f"{self._desc}: {done} {self._unit}s"]
        if self._total:
            parts = [
                f"{self._desc}: {done} of {tqdm.format_sizeof(self._total)} {self._unit}s ({self.n / self._total:.0%})"
            ]
        parts.append(f"{tqdm.format_sizeof(rate)} {self._unit}s/s")
        if self._total and rate:
            parts.append(f"{tqdm.format_interval(max(0, self._total - self.n) / rate)} left")
        return ", ".join([*parts, self._postfix] if self._postfix else parts)

    def close(self) -> None:
        """Do nothing: there is no bar to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
