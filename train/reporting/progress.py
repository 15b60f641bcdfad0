"""A training run's progress: a bar (lines without a terminal), the metrics of each SAE, and the speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...shared.core.terminal.progress import progress
from ..config import TrainConfig
from ..step.sae_trainer import Schedule
from .loggers import loggers_of
from .metrics import Line, MetricsLog

_MOST_SHOWN = 12


class TrainProgress:
    """The bar, if `shown`, and the logs of the SAEs in `folders`; a context manager around training."""

    def __init__(self, config: TrainConfig, schedule: Schedule, step: int, folders: Sequence[Path], shown: bool = True):
        self._schedule = schedule
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self._logs = {folder.name: MetricsLog(folder, step, loggers_of(config, folder, step)) for folder in folders}
        self._bar = progress(
            total=schedule.n_steps * schedule.batch_size,
            initial=step * schedule.batch_size,
            unit="token",
            unit_scale=True,
            desc="train",
            disable=not shown,
        )
        self._started, self._waited, self._logged_step = time.perf_counter(), 0.0, step

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in self._logs.values():
            log.close()
        self._bar.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Exclude the time inside the block from the run's speed; flushes the logs first."""
        for log in self._logs.values():
            log.flush()
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update(self._schedule.batch_size)

    def log(self, lines: Sequence[Line]) -> None:
        """Write metrics of each SAE; all lines of one call have the speed since the last call."""
        if not lines:
            return
        step, metrics = lines[-1]
        elapsed = time.perf_counter() - self._started
        n_tokens = (step - self._logged_step) * self._schedule.batch_size
        speed = {"tokens_per_second": n_tokens / elapsed, "data_wait_fraction": self._waited / elapsed}
        for at, by_sae in lines:
            for name, values in by_sae.items():
                if name in self._logs:
                    self._logs[name].write(at, at * self._schedule.batch_size, {**values, **speed})
        self._bar.set_postfix_str(f"step {step:,} of {self._schedule.n_steps:,}, {_losses(metrics)}", refresh=False)
        self._started, self._waited, self._logged_step = time.perf_counter(), 0.0, step


def _losses(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    fvu = [1 - values["explained_variance"] for values in metrics.values() if "explained_variance" in values]
    return "fvu " + " ".join(f"{value:.3f}" for value in fvu[:_MOST_SHOWN])
