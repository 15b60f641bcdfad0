"""Values that the host reads back from the GPU to fix a step's tensor shapes, and the steps at which it polls them.

The steps of the polls follow from the values read, and are saved with the rest of the state. They do not depend on when
metrics are logged, so a run that resumes polls at the same steps as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..architectures.base import Architecture
from ..architectures.contract import SINGLE_PROCESS, Collectives, Number
from ..architectures.parts.latents import SPARSE_BELOW
from ..kernels.capacity import STEPS_BETWEEN, EntryCapacity, power_of_two

DEAD_STATE, _ROOM_STATE = "looks.dead", "looks.room"
"""Names in checkpoints."""


class DeadLatentPoll:
    """An upper bound on the number of dead latents of every rank, for which AuxK must allocate.

    The largest number of tokens since any latent fired gives a number of steps during which no latent can be dead and
    AuxK has nothing to do. While some latents may be dead, the host polls every 16 steps how many can be dead before
    the next poll.
    """

    def __init__(self, dead_after_tokens: int):
        self.dead_after_tokens = dead_after_tokens
        self.n_dead = 0
        self.next_poll = 0

    def before(
        self, step: int, batch_size: int, tokens_since_fired: Tensor, across: Collectives = SINGLE_PROCESS
    ) -> int:
        """Return the bound for this step, 0 if no latent can be dead; steps count from 0."""
        if step >= self.next_poll:
            soon = tokens_since_fired >= self.dead_after_tokens - STEPS_BETWEEN * batch_size
            n_latents = tokens_since_fired.new_full((), len(tokens_since_fired))
            found = torch.stack([tokens_since_fired.max(), torch.count_nonzero(soon), n_latents])
            longest, count, most_latents = across.most_over_latents(found).tolist()
            left = self.dead_after_tokens - longest
            self.n_dead = min(power_of_two(count), most_latents) if left <= 0 else 0
            self.next_poll = step + (STEPS_BETWEEN if left <= 0 else -(-left // batch_size))
        return self.n_dead

    def state(self) -> Tensor:
        """Return the state that later steps depend on."""
        return torch.tensor([self.n_dead, self.next_poll])

    def load(self, state: Tensor | None) -> None:
        """Restore a saved state; if another code path saved none, poll at the next step."""
        self.n_dead, self.next_poll = state.tolist() if state is not None else (0, 0)


class Polls(Protocol):
    """How an `OpByOp` step learns values that are on the device: `Polled` or `Unpolled`.

    `room` is the capacity for a step's entries if the host must not wait to count them.
    """

    room: EntryCapacity | None

    def before(self, step: int, batch_size: int, tokens_since_fired: Int64[Tensor, " d_sae"]) -> Hashable | None:
        """Return what determines a step's launches, as `StepMode.before` does."""
        ...

    def any_dead(self, step: int, batch_size: int, n_dead: Float[Tensor, ""]) -> bool:
        """Return whether the step's loss depends on dead latents."""
        ...

    def room_for_dead(self, dead: Bool[Tensor, " d_sae"]) -> int | None:
        """Return the number of dead latents that AuxK allocates for; None if it counts them itself."""
        ...

    def metrics(self) -> dict[str, Number]:
        """Return metrics of the polls."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that later steps depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        ...


class Unpolled:
    """Steps that read values from the device whenever they need them: their shapes depend on the data."""

    room: EntryCapacity | None = None

    def __init__(self, architecture: Architecture, dead_after_tokens: int, batch_size: int, across: Collectives):
        self._revives_dead = architecture.revives_dead
        self._dead_after_tokens = dead_after_tokens
        self._batch_size = batch_size
        self._across = across

    def before(self, step: int, batch_size: int, tokens_since_fired: Int64[Tensor, " d_sae"]) -> Hashable | None:
        """Return None, because such a step may wait for the device."""
        return None

    def any_dead(self, step: int, batch_size: int, n_dead: Float[Tensor, ""]) -> bool:
        """Return whether any latent is dead, without reading the device while too few tokens have been seen."""
        can_be_dead = step * max(self._batch_size, batch_size) >= self._dead_after_tokens
        return self._revives_dead and can_be_dead and bool(n_dead > 0)

    def room_for_dead(self, dead: Bool[Tensor, " d_sae"]) -> int | None:
        """Return the number for ranks that share the latents; with a single rank, AuxK counts dead latents itself."""
        return self._across.room_for_dead(dead)

    def metrics(self) -> dict[str, Number]:
        """Return nothing."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing, because no later step depends on a poll."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class Polled:
    """Steps with fixed shapes: the host knows from earlier polls how many latents are dead and how many entries fit."""

    def __init__(self, architecture: Architecture, dead_after_tokens: int, device: torch.device):
        self.room: EntryCapacity | None = EntryCapacity(device)
        self._room = self.room
        self._architecture = architecture
        self.dead = DeadLatentPoll(dead_after_tokens) if architecture.revives_dead else None

    def before(self, step: int, batch_size: int, tokens_since_fired: Int64[Tensor, " d_sae"]) -> Hashable | None:
        """Poll the device if a poll is due, and return everything that determines the step's shapes."""
        n_dead = self.dead.before(step, batch_size, tokens_since_fired) if self.dead else 0
        waited = self._room.waited
        self._room.before(step, SPARSE_BELOW * batch_size * self._architecture.d_sae)
        decided = self._architecture.decided_at(step)
        key = (batch_size, n_dead, self._room.capacity, self._room.margin, decided)
        return None if waited or self._room.exact or decided is None else key

    def any_dead(self, step: int, batch_size: int, n_dead: Float[Tensor, ""]) -> bool:
        """Return whether any latent can be dead, according to the last poll."""
        return self.dead is not None and self.dead.n_dead > 0

    def room_for_dead(self, dead: Bool[Tensor, " d_sae"]) -> int | None:
        """Return how many latents may be dead before the next poll."""
        return self.dead.n_dead if self.dead else None

    def metrics(self) -> dict[str, Number]:
        """Return how many steps did not fit and were skipped."""
        return {"skipped_steps": self._room.skipped.double()} if self._room.asked else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that later steps depend on."""
        return ({DEAD_STATE: self.dead.state()} if self.dead else {}) | {_ROOM_STATE: self._room.state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state, or the initial one if another mode saved none."""
        if self.dead is not None:
            self.dead.load(state.get(DEAD_STATE))
        self._room.load(state.get(_ROOM_STATE))
