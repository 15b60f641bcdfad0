"""What the host must know of the device so that a step's shapes are fixed, and the few steps at which it looks.

Where the looks fall is decided by what they see and saved with the rest of the state, never by when lines are
logged: a run that was resumed looks where the whole one did.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..architectures.base import Architecture
from ..architectures.contract import Collectives, Number
from ..architectures.parts.latents import SPARSE_BELOW
from ..kernels.capacity import STEPS_BETWEEN, EntryCapacity, power_of_two

DEAD_STATE, _ROOM_STATE = "looks.dead", "looks.room"
"""Names in checkpoints."""


class DeadLatentPoll:
    """For how many dead latents AuxK must have room.

    From the longest silence of any latent follows for how many steps none can be dead, and AuxK has no work. While
    some may be, the host looks every 16 steps how many can be before it looks again.
    """

    def __init__(self, dead_after_tokens: int):
        self.dead_after_tokens = dead_after_tokens
        self.n_dead = 0
        self.look_at = 0

    def before(self, step: int, batch_size: int, tokens_since_fired: Tensor) -> int:
        """Return the room that this step needs, 0 where no latent can be dead; steps count from 0."""
        if step >= self.look_at:
            soon = tokens_since_fired >= self.dead_after_tokens - STEPS_BETWEEN * batch_size
            longest, count = torch.stack([tokens_since_fired.max(), torch.count_nonzero(soon)]).tolist()
            left = self.dead_after_tokens - longest
            self.n_dead = min(power_of_two(count), len(tokens_since_fired)) if left <= 0 else 0
            self.look_at = step + (STEPS_BETWEEN if left <= 0 else -(-left // batch_size))
        return self.n_dead

    def state(self) -> Tensor:
        """Return what a later step depends on."""
        return torch.tensor([self.n_dead, self.look_at])

    def load(self, state: Tensor | None) -> None:
        """Go back to a saved state; where another path saved none, look first."""
        self.n_dead, self.look_at = state.tolist() if state is not None else (0, 0)


class Polls(Protocol):
    """What steps taken operation by operation know of the device, by `Polled` or `Unpolled`.

    `room` is the memory for a step's entries where the host must not wait to count them.
    """

    room: EntryCapacity | None

    def before(self, step: int, batch_size: int, tokens_since_fired: Int64[Tensor, " d_sae"]) -> Hashable | None:
        """Return what a step's launches follow from, as `StepMode.before` does."""
        ...

    def any_dead(self, step: int, batch_size: int, n_dead: Float[Tensor, ""]) -> bool:
        """Return whether the step's loss depends on dead latents."""
        ...

    def room_for_dead(self, dead: Bool[Tensor, " d_sae"]) -> int | None:
        """Return for how many dead latents AuxK makes room; None where it counts them itself."""
        ...

    def metrics(self) -> dict[str, Number]:
        """Return metrics of the polls."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a later step depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        ...


class Unpolled:
    """Steps that ask the device whenever they need to know: shapes follow from the data."""

    room: EntryCapacity | None = None

    def __init__(self, architecture: Architecture, dead_after_tokens: int, batch_size: int, across: Collectives):
        self._revives_dead = architecture.revives_dead
        self._dead_after_tokens = dead_after_tokens
        self._batch_size = batch_size
        self._across = across

    def before(self, step: int, batch_size: int, tokens_since_fired: Int64[Tensor, " d_sae"]) -> Hashable | None:
        """Return None: such a step may wait for the device."""
        return None

    def any_dead(self, step: int, batch_size: int, n_dead: Float[Tensor, ""]) -> bool:
        """Return whether any latent is dead; while too few tokens have been seen for that, do not ask the device."""
        can_be_dead = step * max(self._batch_size, batch_size) >= self._dead_after_tokens
        return self._revives_dead and can_be_dead and bool(n_dead > 0)

    def room_for_dead(self, dead: Bool[Tensor, " d_sae"]) -> int | None:
        """Return what ranks that share the latents need; alone, AuxK counts the dead itself."""
        return self._across.room_for_dead(dead)

    def metrics(self) -> dict[str, Number]:
        """Return nothing."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: no later step depends on a poll."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class Polled:
    """Steps of fixed shapes: the host knows from earlier polls how many latents are dead and entries to expect."""

    def __init__(self, architecture: Architecture, dead_after_tokens: int, device: torch.device):
        self.room: EntryCapacity | None = EntryCapacity(device)
        self._room = self.room
        self._architecture = architecture
        self.dead = DeadLatentPoll(dead_after_tokens) if architecture.revives_dead else None

    def before(self, step: int, batch_size: int, tokens_since_fired: Int64[Tensor, " d_sae"]) -> Hashable | None:
        """Poll the device where it is time to, and return all that fixes the step's shapes."""
        n_dead = self.dead.before(step, batch_size, tokens_since_fired) if self.dead else 0
        waited = self._room.waited
        self._room.before(step, SPARSE_BELOW * batch_size * self._architecture.d_sae)
        decided = self._architecture.decided_at(step)
        key = (batch_size, n_dead, self._room.capacity, self._room.margin, decided)
        return None if waited or self._room.exact or decided is None else key

    def any_dead(self, step: int, batch_size: int, n_dead: Float[Tensor, ""]) -> bool:
        """Return whether any latent can be dead, by the last poll."""
        return self.dead is not None and self.dead.n_dead > 0

    def room_for_dead(self, dead: Bool[Tensor, " d_sae"]) -> int | None:
        """Return how many latents may be dead before the next poll."""
        return self.dead.n_dead if self.dead else None

    def metrics(self) -> dict[str, Number]:
        """Return how many steps did not fit and were skipped."""
        return {"skipped_steps": self._room.skipped.double()} if self._room.asked else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a later step depends on."""
        return ({DEAD_STATE: self.dead.state()} if self.dead else {}) | {_ROOM_STATE: self._room.state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state, or the initial one where another mode saved none."""
        if self.dead is not None:
            self.dead.load(state.get(DEAD_STATE))
        self._room.load(state.get(_ROOM_STATE))
