"""The processes that train together: reductions of tensors, and decisions that all ranks take after the same step.

Tensors are sent over the device's own backend (gloo on a CPU, NCCL on a GPU). Flags and Python values are sent over
gloo, so that they do not wait for kernels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from ...shared.core.compute.device import choose_device, device_among
from ...shared.core.compute.launcher import local_position, n_launched
from ...shared.core.compute.processes import Ranks, start_group

_STEPS_LAG = 4
_LOST = (
    "another process of this run stopped or cannot be reached; "
    "run the same command again to resume from the last checkpoint"
)


class TrainRanks(Ranks):
    """The `n` processes that train together, of which this is number `rank` and computes on `device`."""

    def __init__(self, device: str = "cpu", rank: int = 0, n: int = 1):
        super().__init__(rank, n, dist.new_group(backend="gloo") if n > 1 else None, _LOST)
        self.device = device

    def part(self, length: int, rank: int | None = None) -> slice:
        """Return the slice of `length` items that a rank (default: this one) owns; lengths differ by at most one."""
        rank = self.rank if rank is None else rank
        return slice(rank * length // self.n, (rank + 1) * length // self.n)

    def any_of(self, flags: Tensor) -> dist.Work | None:
        """Start an in-place maximum of uint8 flags over all ranks; wait on the result before reading them."""
        with self.reaching():
            return dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control, async_op=True)

    def add(self, *tensors: Tensor) -> None:
        """Sum tensors over all ranks, in place; every rank gets the same bits."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def greatest(self, tensor: Tensor) -> None:
        """Take the elementwise maximum of a tensor over all ranks, in place."""
        self._reduce((tensor,), dist.ReduceOp.MAX)

    def least(self, tensor: Tensor) -> None:
        """Take the elementwise minimum of a tensor over all ranks, in place."""
        self._reduce((tensor,), dist.ReduceOp.MIN)

    def _reduce(self, tensors: tuple[Tensor, ...], operation: dist.ReduceOp.RedOpType) -> None:
        if self.n == 1:
            return
        with self.reaching():
            for work in [dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors]:
                if work is not None:
                    work.wait()

    def stack(self, *tensors: Tensor) -> tuple[Shaped[Tensor, "n ..."], ...]:
        """Return every rank's tensors, stacked in order of rank; those of one place have the same shape on all."""
        sent = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        received = [own.new_empty(self.n, len(own)) for own in sent]
        pairs = zip(received, sent, strict=True)
        with self.reaching():
            for work in [dist.all_gather(list(every.unbind()), own, async_op=True) for every, own in pairs]:
                if work is not None:
                    work.wait()
        found = zip(received, tensors, strict=True)
        return tuple(every.view(-1).view(own.dtype).view(self.n, *own.shape) for every, own in found)

    def concatenate(self, values: Shaped[Tensor, "length ..."]) -> Shaped[Tensor, "all_lengths ..."]:
        """Return every rank's values, concatenated in order of rank; their lengths may differ."""
        if self.n == 1:
            return values
        (lengths,) = self.stack(torch.tensor(len(values), device=values.device))
        padded = values.new_empty(int(lengths.max()), *values.shape[1:])
        padded[: len(values)] = values
        (every,) = self.stack(padded)
        return torch.cat([there[:length] for there, length in zip(every, lengths.tolist(), strict=True)])

    def join(self, parts: Mapping[str, Tensor], length: int, to: int) -> dict[str, Tensor]:
        """Return the whole tensors of `length` rows, of which each rank holds `part`, on rank `to`; else nothing."""
        joined = {}
        with self.reaching():
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
    """The decision of all ranks after a step: stop, or end because no rank has an SAE left to train."""

    stop: bool
    all_diverged: bool


class Agreement:
    """Lets all ranks act after the same step without waiting for each other at every step.

    A rank's request takes effect `_STEPS_LAG` steps later, when the flags of all ranks have arrived.
    """

    def __init__(self, ranks: TrainRanks):
        self._ranks = ranks
        self._asked: deque[tuple[Tensor, dist.Work | None]] = deque()

    def ask(self, stop: bool, trains: bool) -> Decision:
        """Share whether this rank should stop and whether it still trains an SAE; return the decision of all ranks."""
        if self._ranks.n == 1:
            return Decision(stop, not trains)
        flags = torch.tensor([stop, trains], dtype=torch.uint8)
        self._asked.append((flags, self._ranks.any_of(flags)))
        return self._answer() if len(self._asked) > _STEPS_LAG else Decision(False, False)

    def settle(self) -> None:
        """Wait for the flags that are still in flight, without acting on them."""
        while self._asked:
            self._answer()

    def _answer(self) -> Decision:
        flags, work = self._asked.popleft()
        with self._ranks.reaching():
            if work is not None:
                work.wait()
        stop, trains = flags.tolist()
        return Decision(bool(stop), not trains)


@contextmanager
def open_ranks(device: str) -> Iterator[TrainRanks]:
    """Join the processes started by `torchrun` or a compatible launcher; without a launcher, return a single rank.

    A process group that the caller has created is used and not destroyed.

    Raises:
        ConfigError: the device does not exist, or there are fewer devices than processes.
        RankError: the processes cannot connect.
    """
    if not dist.is_initialized() and n_launched() == 1:
        yield TrainRanks(choose_device(device))
        return
    kind = torch.device(choose_device(device)).type
    made_here = start_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    yield TrainRanks(device_among(device, *local_position(rank, n)), rank, n)
    if made_here:  # not after an error: a group that has lost a member may not end
        dist.destroy_process_group()
