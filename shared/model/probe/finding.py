"""The result of measuring one kind of hook point in one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .norms import Affine
from .probe import Place


@dataclass(frozen=True)
class Finding:
    """Where a kind of hook point is in a block and the identity that was measured, or why the block does not have it.

    The activation is `scale` times the input or output of the module at `place` or, with `affine`, that norm's result
    before its weight and bias. `clone` is true if the model later writes into the tensor. `splice` says how to replace
    the activation: "replace" the argument or result, "write" into the existing tensor, or "" if the measurement showed
    that neither replaces it for everything downstream.
    """

    place: Place | None = None
    identity: str = ""
    derived: str = ""
    scale: float = 1.0
    d_in: int = 0
    clone: bool = False
    splice: Literal["replace", "write", ""] = "replace"
    affine: Affine | None = None
    reason: str = ""


Findings = dict[tuple[int, str], Finding]
"""Findings by a block's index and the kind of hook point."""
