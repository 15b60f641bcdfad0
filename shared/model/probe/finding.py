"""What was found of one kind of hook point in one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .norms import Affine
from .probe import Place


@dataclass(frozen=True)
class Finding:
    """Where one kind of hook point of a block is and the identity that was measured, or why there is none.

    The activation is `scale` times what the module at `place` reads or returns, or with `affine` what that norm makes
    of its input before its weight and bias. `clone` says that the model later writes into the tensor, and `splice` how
    another activation takes its place: "replace" the argument or result, "write" into the tensor that is there, or ""
    where that was measured not to replace it for everything downstream.
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
