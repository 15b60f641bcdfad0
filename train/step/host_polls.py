"""What the host must know of the device so that a step's shapes are fixed, and the few steps at which it looks.

Where the looks fall is decided by what they see and saved with the rest of the state, never by when lines are
logged: a run that was resumed looks where the whole one did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.capacity import STEPS_BETWEEN, power_of_two


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
