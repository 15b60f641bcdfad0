"""The processes that harvest one store together: how they meet, agree, and notice that one of them is gone.

No activations pass between them. `torch.distributed` brings them together over gloo, also where the models run on
GPUs; after that they leave word in its key-value store, which waits for nobody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from ...shared.core.device import choose_device, device_among, make_current
from ...shared.core.errors import ConfigError, RankError, ThresherError
from ...shared.store.local.liveness import LivenessLock
from .launch import n_ranks

T = TypeVar("T")
CHECK_SECONDS = 0.5
SECONDS_TO_HEAR = 5.0
_GO_ON = "what was harvested is kept: start the same command again to resume"
_meetings = count()


class Ranks:
    """This process's place among `world` of them.

    Raises:
        RankError: from any method, when another rank failed, is gone or cannot be reached.
    """

    def __init__(self, rank: int, world: int, words: Store, group: Any) -> None:
        self.rank = rank
        self.world = world
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank)) if world > 1 else 0
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1
        self.liveness: LivenessLock | None = None
        self._words = words
        self._group = group
        self._next_check = 0.0
        self._has_told = False

    def lead(self, action: Callable[[], T]) -> T:
        """Return on every rank what the action, run by rank 0 alone, returns; on its failure every rank raises."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as failure:
                error, outcome[1] = failure, _told(failure)
        with self._reached():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise RankError(f"rank {self.rank} stops with rank 0, which failed: {outcome[1]}")
        return outcome[0]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise `ConfigError` unless every rank brings the same facts."""
        if self.world == 1:
            return
        everyone: list[Any] = [None] * self.world
        with self._reached():
            dist.all_gather_object(everyone, dict(facts), group=self._group)
        for rank, theirs in enumerate(everyone):
            first = everyone[0]
            keys = sorted(key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key))
            if keys:
                told = ", ".join(f"{key} ({theirs.get(key)!r}, rank 0 {first.get(key)!r})" for key in keys)
                raise ConfigError(f"rank {rank} differs from rank 0 in {told}; start every rank alike")

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            with self._reached():
                dist.barrier(group=self._group)

    def say(self, what: str, word: str) -> None:
        """Leave this rank's word on something."""
        with self._reached():
            self._words.set(f"{what}/{self.rank}", word)

    def heard(self, what: str, ranks: Sequence[int] | None = None) -> list[str] | None:
        """Return the ranks' words (by default everyone's) on something, or None until all have left one."""
        keys = [f"{what}/{rank}" for rank in (range(self.world) if ranks is None else ranks)]
        with self._reached():
            return [self._words.get(key).decode() for key in keys] if self._words.check(keys) else None

    def check(self) -> None:
        """Raise `RankError` if another rank failed or is gone; looks at most twice a second."""
        if self.world == 1 or time.monotonic() < self._next_check:
            return
        gone = self.liveness.gone() if self.liveness else []
        self._check_failed()
        if gone:
            raise RankError(f"rank {gone[0]} is gone; {_GO_ON}")
        self._next_check = time.monotonic() + CHECK_SECONDS

    def _check_failed(self) -> None:
        try:
            failed = self._words.check(["failed"])
        except RuntimeError:  # rank 0, which keeps the words, ended
            return
        if failed:
            raise RankError(f"rank {self.rank} stops: {self._words.get('failed').decode()}; {_GO_ON}")

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends early, if nobody has told of a failure before."""
        if self.world == 1 or self._has_told:
            return
        self._has_told = True
        try:
            if not self._words.check(["failed"]):
                self._words.set("failed", f"rank {self.rank} failed: {_told(error)}")
            self._words.set(f"left/{self.rank}", "")
            self._let_others_hear()
        except RuntimeError:  # rank 0, which keeps the words, ended before
            return

    def _let_others_hear(self) -> None:
        """Keep the words, as rank 0, until the others that live have had time to read them."""
        until = time.monotonic() + SECONDS_TO_HEAR
        while self.rank == 0 and self.liveness and time.monotonic() < until:
            living = set(range(1, self.world)) - set(self.liveness.gone())
            if not living or self._words.check([f"left/{rank}" for rank in living]):
                return
            time.sleep(CHECK_SECONDS / 10)

    @contextmanager
    def tells_failures(self) -> Iterator[None]:
        """Tell the others at once of what goes wrong within."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn what a broken connection raises into `RankError`."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ThresherError):
                raise
            self._check_failed()
            raise RankError(f"rank {self.rank} stops: another rank ended or cannot be reached; {_GO_ON}") from error


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other ranks, if there are any; only rank 0 writes notes to stderr."""
    if n_ranks() == 1:
        yield Ranks(0, 1, HashStore(), None)
        return
    made_here = not dist.is_initialized()
    if made_here:
        try:
            dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RankError(
                f"cannot meet the other ranks at {where} ({str(error).splitlines()[0]}); start them with torchrun"
            ) from error
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    words = PrefixStore(f"thresher-harvest-{next(_meetings)}", _get_default_store())
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), words, group)
    try:
        with _quiet(ranks.rank > 0), ranks.tells_failures():
            yield ranks
    finally:
        if made_here:
            dist.destroy_process_group()


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def rank_device(device: str, ranks: Ranks) -> str:
    """Return this rank's device, which is then the one that CUDA uses."""
    if ranks.world == 1:
        return choose_device(device)
    own = device_among(device, ranks.local_rank, ranks.local_world)
    make_current(own)
    return own


def _told(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return " ".join(str(error).split()).removesuffix(f"; {_GO_ON}") or type(error).__name__
