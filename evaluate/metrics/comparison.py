"""Compare a sweep's dictionaries in pairs: across widths (feature splitting), and seeds and data (stability)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Int64

from ...shared.core.terminal.progress import progress
from ..saes.sae_folders import EvaluatedSae
from .dictionary import compare_directions, decoder_directions, live

PairKind = Literal["widths", "seeds", "halves", "other"]


def training_settings(sae: EvaluatedSae) -> dict[str, Any]:
    """Return what an SAE was trained with and on, as far as its files say, and how it chooses latents.

    A refined SAE was trained with the same settings as the one it was made from, and chooses otherwise.
    """
    chosen = {"selection": sae.sae.selection, "documents": sae.sae.metadata.get("documents")}
    return sae.sae.config | sae.description() | chosen


def settings_but(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the settings that are known, without the SAE's name and some keys: repetitions share all but the seed."""
    return {key: value for key, value in settings.items() if value is not None and key not in ("name", *keys)}


def pair_kind(a: Mapping[str, Any], b: Mapping[str, Any]) -> PairKind:
    """Return how the training settings of two SAEs differ.

    That is in width, only in the seed, only in the half of the documents (`documents` of the training configuration),
    or otherwise.
    """
    if a["d_sae"] != b["d_sae"]:
        return "widths" if a["architecture"] == b["architecture"] else "other"
    if settings_but(a, "seed") == settings_but(b, "seed"):
        return "seeds"
    disjoint = {a.get("documents"), b.get("documents")} == {"even", "odd"}
    return "halves" if disjoint and settings_but(a, "documents") == settings_but(b, "documents") else "other"


class Fired(Protocol):
    """An object with the number of firings of each latent."""

    @property
    def firings(self) -> Int64[np.ndarray, " d_sae"]: ...


@torch.inference_mode()
def compare_dictionaries(saes: Sequence[EvaluatedSae], latents: Mapping[str, Fired]) -> list[dict[str, Any]]:
    """Compare every pair of SAEs that reconstruct the same hook point, one row per pair; `a` is the narrower SAE."""
    directions = {sae.name: live(decoder_directions(sae.sae), latents[sae.name].firings) for sae in saes}
    pairs = [
        tuple(sorted(pair, key=lambda sae: sae.sae.d_sae)) for pair in combinations(saes, 2) if _same_target(*pair)
    ]
    rows = []
    settings = {sae.name: training_settings(sae) for sae in saes}
    for a, b in progress(pairs, unit="pair", desc="compare"):
        described = {"a": a.name, "b": b.name, "hook_point": a.target}
        described |= {"kind": pair_kind(settings[a.name], settings[b.name])}
        rows.append(described | compare_directions(directions[a.name], directions[b.name]))
    return rows


def _same_target(a: EvaluatedSae, b: EvaluatedSae) -> bool:
    return a.target == b.target
