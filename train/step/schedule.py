"""Schedules, as factors of a peak value: pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal


def lr_factor(
    step: int, n_steps: int, warmup_steps: int, decay_fraction: float, shape: Literal["linear", "cosine"] = "linear"
) -> float:
    """Return the learning rate's factor at a step, counted from 0: linear warm-up, constant, decay to zero.

    The decay covers the last `decay_fraction` of the steps: none for 0, and everything after the warm-up for 1. Its
    shape is a line or half a cosine (arXiv 1608.03983 without restarts). A warm-up that is longer than the time before
    the decay is cut short; if the decay leaves no time before it, the warm-up is kept and multiplies the decay.
    """
    n_decay = round(n_steps * decay_fraction)
    if n_decay < n_steps:
        warmup_steps = min(warmup_steps, n_steps - n_decay)
    rising = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    left = (n_steps - step) / n_decay if n_decay else 1.0
    if left >= 1:
        return rising
    falling = left if shape == "linear" else (1 - math.cos(math.pi * left)) / 2
    return rising * falling


def sparsity_factor(step: int, warmup_steps: int) -> float:
    """Return the sparsity penalty's factor at a step, counted from 0: linear warm-up, then constant."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
