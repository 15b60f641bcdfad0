"""Run the model over batches: on a CPU several at once, each on one core.

The threads of a parallel operator wait for the slowest one at every operator, so all of them wait whenever one of the
writer's threads takes a core. Batches in parallel do not wait for each other. With single-threaded operators, rounding
depends neither on the machine's cores nor on how many batches run at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..shared.core.compute.cores import single_threaded_operators
from ..shared.model.capture import capturing
from .plan import HarvestPlan
from .tokens.packing import ContextBatch

MAX_WORKERS = 16


class Harvested(NamedTuple):
    """A batch, its activations at each hook point, and the seconds that its forward pass took."""

    batch: ContextBatch
    activations: dict[str, Tensor]
    seconds: float


def choose_workers(wanted: int | None, device: torch.device) -> int:
    """Return how many batches to run at once: on a CPU `wanted` or one per core; on a GPU one."""
    if device.type != "cpu":
        return 1
    return wanted or min(torch.get_num_threads(), MAX_WORKERS)


def forward_passes(plan: HarvestPlan, batches: Iterable[ContextBatch], workers: int) -> Generator[Harvested]:
    """Yield the activations of every batch, in order.

    At most `workers + 1` batches are started before they are yielded.
    """
    device = plan.model.device
    with capturing(plan.model, plan.hook_points) as read:

        def run(batch: ContextBatch) -> Harvested:
            started = time.monotonic()
            activations = read(torch.from_numpy(batch.tokens).to(device, torch.long))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
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


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool that on an early exit finishes only the batches already started."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="forward", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
