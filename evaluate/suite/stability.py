"""Stability: whether SAEs that differ only in their seed, or only in their data, find the same directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..metrics.comparison import Fired, pair_kind, training_settings
from ..metrics.dictionary import best_matches, decoder_directions, live
from ..saes.sae_folders import EvaluatedSae

KEYS = {"seeds": ("seed_stability", "repetitions"), "halves": ("half_stability",)}
"""By the kind of the pairs, the keys of the mean cosine and of the number of repetitions."""
WIDEST_ASSIGNMENT = 8192
"""Up to this many latents, directions are matched one to one; beyond, each with its nearest."""


@torch.no_grad()
def matched_cosines(saes: Sequence[EvaluatedSae], latents: Mapping[str, Fired]) -> dict[str, dict[str, float | int]]:
    """Return, by name, the mean cosine of an SAE's live directions with the matched ones of its repetitions.

    Repetitions have the same hook point and settings, but for the seed (`seed_stability`), or but for the half of the
    documents that they were trained on (`half_stability`). Directions are matched one to one so that the sum of cosines
    is largest; those without a partner, because fewer are live in the other SAE, count as zero. SAEs without
    repetitions are left out.
    """
    settings = {sae.name: training_settings(sae) for sae in saes}
    directions = {sae.name: live(decoder_directions(sae.sae), latents[sae.name].firings) for sae in saes}
    found: dict[str, dict[str, float | int]] = {}
    for sae in saes:
        others = [other for other in saes if other is not sae and other.target == sae.target]
        for kind, keys in KEYS.items():
            repeated = [other for other in others if pair_kind(settings[sae.name], settings[other.name]) == kind]
            if repeated and len(directions[sae.name]):
                values = [_matched(directions[sae.name], directions[other.name]) for other in repeated]
                measured = (sum(values) / len(values), len(values))
                found.setdefault(sae.name, {}).update(zip(keys, measured, strict=False))
    return found


def _matched(a: torch.Tensor, b: torch.Tensor) -> float:
    if not len(b):
        return 0.0
    if max(len(a), len(b)) > WIDEST_ASSIGNMENT:
        return float(best_matches(a, b)[0].mean())
    from scipy.optimize import linear_sum_assignment

    cosine = (a @ b.T).cpu().numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    return float(cosine[rows, columns].sum()) / len(a)
