"""Capacity for the entries of sparse latents, where the host does not wait for their number."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS_BETWEEN = 16
_LEAST_CAPACITY = 1024
_MOST_MARGIN = 16


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n; few distinct shapes need few captures."""
    return 1 << max(0, n - 1).bit_length()


class EntryCapacity:
    """How many entries a step's sparse latents have memory for, so that the host need not wait to count them.

    Selections above a threshold wait for the exact number until the host has read it once; the capacity is then twice
    that, rounded up to a power of two. A step whose entries do not fit, or whose certificate fails, is skipped:
    `failed`, on the device, suppresses its update, and `skipped` counts it. The next poll increases the capacity.
    """

    def __init__(self, device: torch.device):
        self.capacity: int | None = None
        self.margin = 1
        self.exact = False
        self.next_poll = STEPS_BETWEEN
        self.asked = False
        self.waited = False
        self.failed = torch.zeros((), device=device)
        self._most = torch.full((), -1, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped_before = 0

    def before(self, step: int, sparse_entries: float) -> None:
        """Poll the device if it is time to, before a step; from `sparse_entries` on, dense products are cheaper."""
        self.waited = False
        if step >= self.next_poll:
            self._poll(step, sparse_entries)
        if self.exact or self.capacity is None:
            # A step that waits certifies nothing, so it would leave an earlier failure.
            self.failed.zero_()

    def _poll(self, step: int, sparse_entries: float) -> None:
        self.next_poll = step + STEPS_BETWEEN
        if not self.asked:
            return
        most, skipped = torch.stack([self._most, self.skipped]).tolist()
        self.exact = skipped > self._skipped_before
        if self.exact:
            self.margin = min(2 * self.margin, _MOST_MARGIN)
        if most >= 0:
            room = max(_LEAST_CAPACITY, power_of_two(2 * most))
            if most >= sparse_entries:
                self.capacity = None
            elif self.capacity is None or room > self.capacity or 4 * room <= self.capacity:
                self.capacity = room
        self._most.fill_(-1)
        self._skipped_before = skipped

    def counted(self, n_entries: int) -> None:
        """Record the number of entries of a step that waited for it."""
        self.asked = self.waited = True
        self._most.clamp_(min=n_entries)

    def found(self, n_entries: Tensor) -> None:
        """Record, on the device, how many entries a step found; some may not have fitted."""
        assert self.capacity is not None
        torch.maximum(self._most, n_entries, out=self._most)
        self.certify(n_entries <= self.capacity)

    def certify(self, certified: Tensor) -> None:
        """Suppress the step's update, on the device, if it is not certified."""
        self.asked = True
        self.failed.copy_(~certified)
        self.skipped.add_(~certified)

    def state(self) -> Tensor:
        """Return the state that later steps depend on."""
        numbers = [self.asked, self.capacity or 0, self.margin, self.exact, self.next_poll, self._skipped_before]
        return torch.tensor([*numbers, *torch.stack([self._most, self.skipped]).tolist()])

    def load(self, state: Tensor | None) -> None:
        """Restore a saved state, or the initial one if another code path saved none."""
        saved = state.tolist() if state is not None else [0, 0, 1, 0, 0, 0, -1, 0]
        self.asked, self.capacity, self.margin, self.exact = bool(saved[0]), saved[1] or None, saved[2], bool(saved[3])
        self.next_poll, self._skipped_before = saved[4:6]
        self._most.fill_(saved[6])
        self.skipped.fill_(saved[7])
