"""Run the model over batches: on a CPU several at once, each on one core.

The threads of a parallel operator wait for the slowest one at every operator, so all of them wait whenever one of the
writer's threads takes a core. Batches in parallel do not wait for each other. With single-threaded operators, rounding
depends neither on the machine's cores nor on how many batches run at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...shared.core.compute.cores import single_threaded_operators
from ...shared.core.compute.host_copies import SLOTS, HostCopies, PendingCopy
from ...shared.core.errors import RankError, one_line
from ...shared.model.capture import capturing
from ...shared.model.loading.placement import input_device
from ...shared.model.loading.tensor_parallel import Team
from ..tokens.packing import ContextBatch
from .plan import HarvestPlan
from .vllm_engine import VllmEngine

MAX_WORKERS = 16
_Read = Callable[[Tensor], dict[str, Tensor]]


class Harvested(NamedTuple):
    """A batch, its activations at each hook point, and the seconds that its forward pass took.

    The activations of a GPU are in buffers that are overwritten once the next batch is asked for.
    """

    batch: ContextBatch
    activations: dict[str, Tensor]
    seconds: float


def choose_workers(wanted: int | None, device: torch.device) -> int:
    """Return how many batches to run at once: on a CPU `wanted` or one per core; on a GPU one."""
    if device.type != "cpu":
        return 1
    return wanted or min(torch.get_num_threads(), MAX_WORKERS)


def forward_passes(
    plan: HarvestPlan, batches: Iterable[ContextBatch], workers: int, dtype: torch.dtype | None = None
) -> Generator[Harvested]:
    """Yield the activations of every batch, in order and on the CPU.

    On a CPU, at most `workers + 1` batches are started before they are yielded. On a GPU the activations are rounded to
    `dtype` (default: the model's) there, and are copied to the host while the next batches run.
    """
    if plan.engine is not None:
        yield from _passes_of_engine(plan.engine, batches)
        return
    device = input_device(plan.model)
    with capturing(plan.model, plan.hook_points) as alone, leading(alone, plan.team) as read:
        if device.type == "cuda":
            yield from _overlapped(read, batches, HostCopies(device, dtype or plan.model.dtype), device)
            return

        def run(batch: ContextBatch) -> Harvested:
            started = time.monotonic()
            activations = read(torch.from_numpy(batch.tokens).to(device, torch.long))
            return Harvested(batch, activations, time.monotonic() - started)

        if device.type != "cpu":
            yield from map(run, batches)
            return
        with single_threaded_operators(), _pool(workers) as pool:
            running: deque[Future[Harvested]] = deque()
            for batch in batches:
                running.append(pool.submit(run, batch))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()


def _passes_of_engine(engine: VllmEngine, batches: Iterable[ContextBatch]) -> Generator[Harvested]:
    """Yield each batch, in order, while the engine runs the next one."""
    queued: deque[tuple[ContextBatch, Future[list[Path]], float]] = deque()

    def first() -> Harvested:
        batch, files, started = queued.popleft()
        return Harvested(batch, engine.read(batch.tokens, files.result()), time.monotonic() - started)

    with _pool(1) as pool:
        for batch in batches:
            queued.append((batch, pool.submit(engine.run, batch.tokens), time.monotonic()))
            if len(queued) > 1:
                yield first()
        while queued:
            yield first()


def _overlapped(
    read: Callable[[Tensor], dict[str, Tensor]],
    batches: Iterable[ContextBatch],
    copies: HostCopies,
    device: torch.device,
) -> Generator[Harvested]:
    """Yield each batch once it is on the host; by then the next ones are queued on the device."""
    queued: deque[tuple[ContextBatch, PendingCopy, float]] = deque()

    def first() -> Harvested:
        batch, copy, started = queued.popleft()
        return Harvested(batch, copy.wait(), time.monotonic() - started)

    for batch in batches:
        started = time.monotonic()
        tokens = torch.from_numpy(batch.tokens)
        tokens = tokens.pin_memory() if device.type == "cuda" else tokens
        queued.append((batch, copies.start(read(tokens.to(device, torch.long, non_blocking=True))), started))
        if len(queued) == SLOTS:
            yield first()
    while queued:
        yield first()


@contextmanager
def leading(read: _Read, team: Team | None) -> Iterator[_Read]:
    """Yield `read`, after giving its tokens to the other processes of the team, which `follow`.

    At the end they are told that there are no more tokens, or why this process fails.
    """
    if team is None:
        yield read
        return
    failure = ""

    def together(tokens: Tensor) -> dict[str, Tensor]:
        team.from_first(tokens.cpu())
        with team.reaching():
            return read(tokens)

    try:
        yield together
    except GeneratorExit:
        failure = "it stopped before the end"
        raise
    except Exception as error:
        failure = one_line(error)
        raise
    finally:
        with suppress(RankError):  # one that is gone needs no message
            team.from_first(failure)


def follow(plan: HarvestPlan) -> None:
    """Run the forward passes that the first process of this one's team runs, until it ends.

    Raises:
        RankError: the first process failed, or is gone.
    """
    team = plan.team
    assert team is not None
    device = input_device(plan.model)
    with capturing(plan.model, plan.hook_points) as read:
        while isinstance(given := team.from_first(None), Tensor):
            with team.reaching():
                read(given.to(device))
    if given:
        raise RankError(f"this process stops with the first one of its team: {given}")


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool that on an early exit finishes only the batches already started."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="forward", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
