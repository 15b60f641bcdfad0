"""Groups of hook points: a crosscoder's rows are the rows of several hook points, concatenated.

A group has one name, such as `blocks.1.resid_post + blocks.2.resid_post`. The name of a group of one is its hook
point's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.model.hook_points import members
from ...shared.store import ActivationStore


def concatenate(activations: Mapping[str, Float[Tensor, "*batch d"]], group: str) -> Float[Tensor, "*batch d_in"]:
    """Concatenate the rows of a group's hook points; the rows of a group of one are not copied."""
    parts = [activations[hook_point] for hook_point in members(group)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def width(store: ActivationStore, group: str) -> int:
    """Return the width of a group's concatenated rows."""
    return sum(store.d_in(hook_point) for hook_point in members(group))
