"""The processes of a run and what they tell each other: `torch.distributed`, with one error for a rank that is gone.

Tensors go over the device's own backend (gloo on a CPU, NCCL on a GPU); flags and records over gloo, so that they
wait for no kernel.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from ...shared.core.device import choose_device, device_among
from ...shared.core.errors import RankError

T = TypeVar("T")
_LAG = 4


class Ranks:
    """This process's place among `n` that train together; of one, every method returns its own argument.

    Raises:
        RankError: from any method, when another process died or cannot be reached.
    """

    def __init__(self, device: str = "cpu", rank: int = 0, n: int = 1, local_n: int = 1):
        self.device = device
        self.rank = rank
        self.n = n
        self.local_n = local_n
        self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if n > 1 else None

    @property
    def first(self) -> bool:
        """Return whether this is the rank that writes what is not one SAE's, and shows progress."""
        return self.rank == 0

    def part(self, length: int, rank: int | None = None) -> slice:
        """Return a rank's part, by default this one's, of so many things; parts differ by at most one."""
        rank = self.rank if rank is None else rank
        return slice(rank * length // self.n, (rank + 1) * length // self.n)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of rank; all have arrived here when it returns."""
        values: list[T] = [value] * self.n
        if self.n > 1:
            with _rank_errors():
                dist.all_gather_object(values, value, group=self._control)
        return values

    def from_first(self, value: T) -> T:
        """Return the first rank's value."""
        values = [value]
        if self.n > 1:
            with _rank_errors():
                dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def any_of(self, flags: Tensor) -> dist.Work | None:
        """Start to set each of this rank's uint8 flags where any rank's is set."""
        with _rank_errors():
            return dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control, async_op=True)

    def add(self, *tensors: Tensor) -> None:
        """Make tensors the sums of all ranks', in place and the same on every rank."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def greatest(self, tensor: Tensor) -> None:
        """Make a tensor the elementwise maximum of all ranks', in place."""
        self._reduce((tensor,), dist.ReduceOp.MAX)

    def least(self, tensor: Tensor) -> None:
        """Make a tensor the elementwise minimum of all ranks', in place."""
        self._reduce((tensor,), dist.ReduceOp.MIN)

    def _reduce(self, tensors: tuple[Tensor, ...], operation: dist.ReduceOp.RedOpType) -> None:
        if self.n == 1:
            return
        with _rank_errors():
            for work in [dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors]:
                if work is not None:
                    work.wait()

    def stack(self, values: Tensor) -> Shaped[Tensor, "n ..."]:
        """Return every rank's values, which have one shape, in order of rank."""
        own = values.contiguous().view(-1).view(torch.uint8)
        every = own.new_empty(self.n, len(own))
        with _rank_errors():
            dist.all_gather(list(every.unbind()), own)
        return every.view(-1).view(values.dtype).view(self.n, *values.shape)

    def concatenate(self, values: Shaped[Tensor, "length ..."]) -> Shaped[Tensor, "all_lengths ..."]:
        """Return every rank's values one after another; their lengths may differ."""
        if self.n == 1:
            return values
        lengths = self.stack(torch.tensor(len(values), device=values.device)).tolist()
        padded = values.new_empty(max(lengths), *values.shape[1:])
        padded[: len(values)] = values
        return torch.cat([every[:length] for every, length in zip(self.stack(padded), lengths, strict=True)])

    def join(self, parts: Mapping[str, Tensor], length: int, to: int) -> dict[str, Tensor]:
        """Return, on rank `to`, tensors of a length of which each rank has its part in memory; elsewhere, nothing."""
        joined = {}
        with _rank_errors():
            for name in sorted(parts):
                own = parts[name].detach().cpu().contiguous()
                if self.rank != to:
                    dist.send(own, to, group=self._control)
                    continue
                whole = joined[name] = own.new_empty(length, *own.shape[1:])
                whole[self.part(length)] = own
                for other in range(self.n):
                    if other != to:
                        dist.recv(whole[self.part(length, other)], other, group=self._control)
        return joined


class Decision(NamedTuple):
    """What all ranks do after a step."""

    stop: bool
    all_diverged: bool


class Agreement:
    """Let all ranks act after the same step, without waiting for each other at each.

    What one says at a step is acted on a few steps later, by when everyone's word has long arrived.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._asked: deque[tuple[Tensor, dist.Work | None]] = deque()

    def ask(self, stop: bool, trains: bool) -> Decision:
        """Say whether this rank was asked to stop and whether it has an SAE left to train; return what all do now."""
        if self._ranks.n == 1:
            return Decision(stop, not trains)
        flags = torch.tensor([stop, trains], dtype=torch.uint8)
        self._asked.append((flags, self._ranks.any_of(flags)))
        return self._answer() if len(self._asked) > _LAG else Decision(False, False)

    def settle(self) -> None:
        """Wait for what was asked and is no longer to be acted on."""
        while self._asked:
            self._answer()

    def _answer(self) -> Decision:
        flags, work = self._asked.popleft()
        with _rank_errors():
            if work is not None:
                work.wait()
        stop, trains = flags.tolist()
        return Decision(bool(stop), not trains)


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that `torchrun`, or a launcher with its environment variables, started; alone without one.

    A process group that the caller has made already is used and left as it is.

    Raises:
        ConfigError: the device is not there for every process.
    """
    if dist.is_initialized():
        yield _among_others(device)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks(choose_device(device))
        return
    kind = torch.device(choose_device(device)).type
    with _rank_errors():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    yield _among_others(device)
    dist.destroy_process_group()


def _among_others(device: str) -> Ranks:
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    local_n = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return Ranks(device_among(device, local_rank, local_n), dist.get_rank(), dist.get_world_size(), local_n)


@contextmanager
def _rank_errors() -> Iterator[None]:
    """Turn what a broken connection raises into `RankError`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RankError(
            "another process of this run stopped or cannot be reached; "
            "start the same command again to resume from the last checkpoint"
        ) from error
