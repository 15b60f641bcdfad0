"""The processes of one run: how they meet, exchange values, and report that one of them is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import RankError
from .launcher import local_position

_T = TypeVar("_T")


class Ranks:
    """The `n` processes of a run, of which this is number `rank`.

    `local_rank` and `local_n` count the processes of this machine. `control` is the process group for Python values.
    With one process, every method returns at once.

    Raises:
        RankError: from any method, when another process ended or cannot be reached; `lost` is its message.
    """

    def __init__(self, rank: int, n: int, control: Any, lost: str):
        self.rank = rank
        self.n = n
        self.local_rank, self.local_n = local_position(rank, n)
        self._control = control
        self.lost = lost

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which shows progress and writes the files that all ranks share."""
        return self.rank == 0

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's value, in order of rank. Returns only after all ranks have called it."""
        values: list[_T] = [value] * self.n
        if self.n > 1:
            with self.reaching():
                dist.all_gather_object(values, value, group=self._control)
        return values

    def from_first(self, value: _T) -> _T:
        """Return rank 0's value."""
        values = [value]
        if self.n > 1:
            with self.reaching():
                dist.broadcast_object_list(values, group=self._control, group_src=0)
        return values[0]

    def meet(self) -> None:
        """Wait until every rank has called this."""
        if self.n > 1:
            with self.reaching():
                dist.barrier(group=self._control)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn the errors of `torch.distributed` within this context into `RankError`."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RankError(self.lost) from error


def start_group(backend: str) -> bool:
    """Connect the launched processes, unless the caller has already; return whether this call did.

    Raises:
        RankError: the processes cannot meet.
    """
    if dist.is_initialized():
        return False
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"cannot meet the other ranks at {where} ({str(error).splitlines()[0]}); start them with torchrun"
        ) from error
    return True
