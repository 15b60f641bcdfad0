"""Schedules, as factors of a peak value: pure functions of the step."""

from __future__ import annotations


def lr_factor(step: int, n_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Return the learning rate's factor at a step, counted from 0: linear warm-up, constant, linear decay to zero.

    A warm-up longer than the time before the decay is cut short.
    """
    n_decay = round(n_steps * decay_fraction)
    warmup_steps = min(warmup_steps, n_steps - n_decay)
    rising = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    falling = (n_steps - step) / n_decay if step >= n_steps - n_decay and n_decay else 1.0
    return min(rising, falling)


def sparsity_factor(step: int, warmup_steps: int) -> float:
    """Return the sparsity penalty's factor at a step, counted from 0: linear warm-up, then constant."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
