"""Matching pursuit: one latent at a time is chosen, the one that says most of what is left of a row.

Mallat and Zhang, "Matching Pursuits with Time-Frequency Dictionaries" (1993); of SAEs, arXiv 2506.03093. The dictionary
is both encoder and decoder. Latents are never negative: a direction that points against what is left is not chosen.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def matching_pursuit(
    rows: Float[Tensor, "rows d"],
    directions: Float[Tensor, "d_sae d"],
    *,
    residual_threshold: float,
    max_iterations: int,
    stop_on_duplicate_support: bool,
) -> Float[Tensor, "rows d_sae"]:
    """Return the latents of rows: what the chosen directions were multiplied by, summed over the steps.

    At each step the direction with the largest product with what is left of a row adds that product to its latent and
    takes `product * direction` away from what is left. A row is finished when the norm of what is left is below
    `residual_threshold` (if that is above zero), when a step chose no new latent (with `stop_on_duplicate_support`),
    or after `max_iterations` steps.

    Gradients go through the products of the chosen directions, not through the choice. The definition is that of
    SAELens's `matching_pursuit`.
    """
    latents = rows.new_zeros(len(rows), len(directions))
    unfinished = torch.arange(len(rows), device=rows.device)
    left = rows
    for _ in range(max_iterations):
        if not len(unfinished):
            break
        with torch.no_grad():
            chosen = (left @ directions.T).argmax(dim=1)
        products = (left * directions[chosen]).sum(dim=1).relu()
        is_new = (products > 0) & (latents.detach()[unfinished, chosen] == 0)
        latents.index_put_((unfinished, chosen), products, accumulate=True)
        left = left - products[:, None] * directions[chosen]
        goes_on = torch.ones_like(is_new)
        if stop_on_duplicate_support:
            goes_on &= is_new
        if residual_threshold > 0:
            goes_on &= left.detach().norm(dim=1) >= residual_threshold
        unfinished, left = unfinished[goes_on], left[goes_on]
    return latents
