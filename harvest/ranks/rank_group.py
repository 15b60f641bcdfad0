"""The processes that harvest one store together: how they agree, exchange messages, and notice that one is gone.

No activations pass between them. They connect over gloo, even if the models run on GPUs. After that, each leaves
messages in the key-value store of `torch.distributed`, which the others read without waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from ...shared.core.compute.device import choose_device, device_among, make_current
from ...shared.core.compute.launcher import n_launched
from ...shared.core.compute.processes import Ranks, start_group
from ...shared.core.errors import ConfigError, RankError
from ...shared.model.loading.tensor_parallel import Team
from ...shared.store.local.liveness import LivenessLock
from ...shared.store.write.rank_store import POLL_SECONDS

_T = TypeVar("_T")
SECONDS_BETWEEN_CHECKS = 0.5
SECONDS_TO_READ = 5.0
_RESUME = "what was harvested is kept: run the same command again to resume"
TIMEOUT = timedelta(hours=2)
_group_numbers = count()


class RankGroup(Ranks):
    """The `n` processes that write one store, of which this is number `rank`.

    Raises:
        RankError: from any method, when another rank failed, ended or cannot be reached.
    """

    def __init__(self, rank: int, n: int, messages: Store, control: Any) -> None:
        super().__init__(rank, n, control, f"rank {rank} stops: another rank ended or cannot be reached; {_RESUME}")
        self.liveness: LivenessLock | None = None
        self.messages = messages
        self._next_check = 0.0
        self._has_reported = False

    def lead(self, action: Callable[[], _T]) -> _T:
        """Run an action on rank 0 only and return its result on every rank; if it fails, every rank raises."""
        if self.n == 1:
            return action()
        outcome: list[Any] = [None, None]
        error = None
        if self.first:
            try:
                outcome[0] = action()
            except Exception as failure:
                error, outcome[1] = failure, _reason(failure)
        result, failed = self.from_first(outcome)
        if error is not None:
            raise error
        if failed is not None:
            raise RankError(f"rank {self.rank} stops with rank 0, which failed: {failed}")
        return result

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise `ConfigError` unless every rank passes the same facts."""
        first, *others = self.gather(dict(facts))
        for rank, theirs in enumerate(others, 1):
            keys = sorted(key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key))
            if keys:
                differences = ", ".join(f"{key} ({theirs.get(key)!r}, rank 0 {first.get(key)!r})" for key in keys)
                raise ConfigError(f"rank {rank} differs from rank 0 in {differences}; use the same for all ranks")

    def publish(self, topic: str, message: str) -> None:
        """Set this rank's message on a topic."""
        with self.reaching():
            self.messages.set(f"{topic}/{self.rank}", message)

    def published(self, topic: str, ranks: Sequence[int] | None = None) -> list[str] | None:
        """Return the messages of some ranks (default: all) on a topic; None until each has set one."""
        keys = [f"{topic}/{rank}" for rank in (range(self.n) if ranks is None else ranks)]
        with self.reaching():
            return [self.messages.get(key).decode() for key in keys] if self.messages.check(keys) else None

    def check(self) -> None:
        """Raise `RankError` if another rank failed or is gone. Checks at most twice a second."""
        if self.n == 1 or time.monotonic() < self._next_check:
            return
        gone = self.liveness.gone() if self.liveness else []
        self._check_failed()
        if gone:
            raise RankError(f"rank {gone[0]} is gone; {_RESUME}")
        self._next_check = time.monotonic() + SECONDS_BETWEEN_CHECKS

    def _check_failed(self) -> None:
        try:
            failed = self.messages.check(["failed"])
        except RuntimeError:  # rank 0, which holds the messages, ended
            return
        if failed:
            raise RankError(f"rank {self.rank} stops: {self.messages.get('failed').decode()}; {_RESUME}")

    def fail(self, error: BaseException) -> None:
        """Publish why this rank ends early, unless a failure has been published before."""
        if self.n == 1 or self._has_reported:
            return
        self._has_reported = True
        try:
            if not self.messages.check(["failed"]):
                self.messages.set("failed", f"rank {self.rank} failed: {_reason(error)}")
            self.messages.set(f"left/{self.rank}", "")
            self._wait_for_readers()
        except RuntimeError:  # rank 0, which holds the messages, ended before
            return

    def _wait_for_readers(self) -> None:
        """On rank 0, wait until the other live ranks have read the messages and left, for a few seconds at most."""
        until = time.monotonic() + SECONDS_TO_READ
        while self.first and self.liveness and time.monotonic() < until:
            alive = set(range(1, self.n)) - set(self.liveness.gone())
            if not alive or self.messages.check([f"left/{rank}" for rank in alive]):
                return
            time.sleep(SECONDS_BETWEEN_CHECKS / 10)

    @contextmanager
    def reporting_failures(self) -> Iterator[None]:
        """Publish any exception within this context to the other ranks."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """As in `Ranks`, but if another rank published its failure, that is the error."""
        try:
            with super().reaching():
                yield
        except RankError:
            self._check_failed()
            raise


@contextmanager
def join_ranks(tensor_parallel: int = 1) -> Iterator[tuple[RankGroup, Team | None]]:
    """Connect to the other processes, if there are any; only the first one writes notes to stderr.

    Yields the group of all processes and, with `tensor_parallel`, this process's team: consecutive processes.

    Raises:
        ConfigError: the processes do not make whole teams, or a team would be spread over machines.
    """
    if n_launched() == 1:
        yield RankGroup(0, 1, HashStore(), None), None
        return
    made_here = start_group("cpu:gloo,cuda:nccl" if tensor_parallel > 1 and torch.cuda.is_available() else "gloo")
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    messages = PrefixStore(f"thresher-harvest-{next(_group_numbers)}", _get_default_store())
    everyone = RankGroup(dist.get_rank(), dist.get_world_size(), messages, control)
    try:
        with _quiet(not everyone.first), everyone.reporting_failures():
            yield everyone, _team(everyone, tensor_parallel) if tensor_parallel > 1 else None
    finally:
        if made_here:
            dist.destroy_process_group()


def _team(everyone: RankGroup, size: int) -> Team:
    if everyone.n % size or everyone.local_n % size:
        raise ConfigError(
            f"tensor_parallel is {size}, but {everyone.n} processes were started, {everyone.local_n} on this machine; "
            f"start a multiple of {size} on each"
        )
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=TIMEOUT, backend="gloo")
        for first in range(0, everyone.n, size)
    ]
    number, rank = divmod(everyone.rank, size)
    return Team(rank, size, groups[number], everyone.lost, number, everyone.n // size)


def join_leaders(everyone: RankGroup, team: Team | None) -> RankGroup:
    """Return the group of the teams' first processes, which write the store; every process must call this.

    Without a team, everyone leads.
    """
    if team is None:
        return everyone
    leaders = dist.new_group(list(range(0, everyone.n, team.n)), timeout=TIMEOUT, backend="gloo")
    return RankGroup(team.number, team.n_teams, everyone.messages, leaders)


def wait_for(ready: Callable[[], _T | None], check: Callable[[], None], seconds_between: float = POLL_SECONDS) -> _T:
    """Poll `ready` until it returns a value other than None, and return that; call `check` before each wait."""
    while (found := ready()) is None:
        check()
        time.sleep(seconds_between)
    return found


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as devnull, redirect_stderr(devnull):
        yield


def rank_device(device: str, ranks: Ranks) -> str:
    """Return this rank's device, and make it the current CUDA device if it is a GPU."""
    if ranks.n == 1:
        return choose_device(device)
    own = device_among(device, ranks.local_rank, ranks.local_n)
    make_current(own)
    return own


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return " ".join(str(error).split()).removesuffix(f"; {_RESUME}") or type(error).__name__
