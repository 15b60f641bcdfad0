"""What each latent does to a metric, exactly or by an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How much of a metric each latent is responsible for: the drop if it is set to its baseline.

    Attributes:
        metric: `[batch]`, the metric of each text without an ablation.
        latents: for each SAE, a sparse tensor `[batch, context, d_sae]` of the drops of active latents, or
            `[batch, d_sae]` of those of a latent at all its tokens at once.
        errors: for each SAE, `[batch, context]`: the drops of its errors. Ablation measures none.
    """

    metric: Float[Tensor, " batch"]
    latents: Mapping[str, Tensor]
    errors: Mapping[str, Float[Tensor, "batch context"]]

    def table(self, n: int | None = 20) -> list[dict[str, Any]]:
        """Return the `n` largest scores by size (None for all), with text, position, hook point and latent.

        A score of a latent at all its tokens has no position.
        """
        rows = []
        for name, scores in self.latents.items():
            *places, latent = scores.indices().tolist()
            texts = places[0]
            positions = places[1] if len(places) > 1 else [None] * len(texts)
            for text, position, number, value in zip(texts, positions, latent, scores.values().tolist(), strict=True):
                rows.append({"text": text, "position": position, "hook_point": name, "latent": number, "score": value})
        rows.sort(key=lambda row: -abs(row["score"]))
        return rows[:n]

    def by_latent(self) -> dict[str, Float[Tensor, "batch d_sae"]]:
        """Return each latent's scores, summed over a text's tokens."""
        return {
            name: torch.sparse.sum(scores, dim=1).to_dense() if scores.ndim == 3 else scores.to_dense()
            for name, scores in self.latents.items()
        }
