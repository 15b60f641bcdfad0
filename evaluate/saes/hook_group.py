"""Hook points that an SAE takes together: a crosscoder's rows are those of several, one after the other.

Together they have one name, `blocks.1.resid_post + blocks.2.resid_post`; a single hook point is its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.store import ActivationStore

SEPARATOR = " + "


def together(places: Iterable[str]) -> str:
    """Return the name of several hook points taken together."""
    return SEPARATOR.join(places)


def places(hook_point: str) -> list[str]:
    """Return the hook points that a name stands for."""
    return hook_point.split(SEPARATOR)


def joined(activations: Mapping[str, Float[Tensor, "*batch d"]], hook_point: str) -> Float[Tensor, "*batch d_in"]:
    """Return the rows of the hook points that a name stands for, side by side; of a single one, as they are."""
    parts = [activations[place] for place in places(hook_point)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def width(store: ActivationStore, hook_point: str) -> int:
    """Return how wide the joined rows are."""
    return sum(store.d_in(place) for place in places(hook_point))
