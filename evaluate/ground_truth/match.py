"""Match decoder rows with the directions of true features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ...shared.sae import Sae
from ...shared.synthetic.truth import Truth

_ENTRIES = 1 << 26


class Match(NamedTuple):
    """Each latent's closest feature, by the absolute cosine of its decoder row, and the scores of the whole match."""

    feature: Int64[Tensor, " d_sae"]
    cosine: Float[Tensor, " d_sae"]
    mcc: float
    uniqueness: float
    splitting: float


@torch.no_grad()
def match_features(sae: Sae, truth: Truth) -> Match:
    """Compare every decoder row with every feature.

    `mcc` is the mean absolute cosine under the best one-to-one matching (arXiv 2505.20254), `uniqueness` the number of
    features that are some latent's closest per latent. `splitting` is the share of features without a latent of their
    own among those with children where the feature or a child has one; NaN without such features.
    """
    from scipy.optimize import linear_sum_assignment

    decoder = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    vectors = torch.nn.functional.normalize(truth.vectors.float(), dim=1)
    step = max(1, _ENTRIES // len(vectors))
    # The matching needs all cosines at once: 4 bytes for each pair of a latent and a feature.
    cosines = np.concatenate([(part @ vectors.T).abs().cpu().numpy() for part in decoder.split(step)])
    feature = torch.from_numpy(cosines.argmax(1))
    latents, features = linear_sum_assignment(cosines, maximize=True)
    forest = truth.forest
    has_latent = torch.zeros(len(vectors), dtype=torch.bool)
    has_latent[feature] = True
    child_has_latent = torch.zeros_like(has_latent)
    parents = forest.parent[feature]
    child_has_latent[parents[parents >= 0]] = True
    found = (forest.n_children > 0) & (has_latent | child_has_latent)
    n_found = int(found.sum())
    return Match(
        feature.to(sae.device),
        torch.from_numpy(cosines.max(1)),
        float(cosines[latents, features].mean()),
        len(feature.unique()) / len(feature),
        int((found & ~has_latent).sum()) / n_found if n_found else float("nan"),
    )
