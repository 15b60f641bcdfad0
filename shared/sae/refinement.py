"""Choosing latents a second time, with sparse operations on what was chosen first.

A latent that fires only because its direction is similar to others' does not survive a look at the residual. Leaving
one out: with `left = x - x_hat`, the residual without latent i is `left + f_i d_i`, so the value that reconstructs it
best is

    s_i = f_i + left . d_i / |d_i|^2

and the latent is kept where s_i is above its threshold. Thresholds need no truth: a latent that is either absent or
present at some typical size is told apart best halfway, at half its mean where it is present.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import SaeError
from .selection import active_entries

_ENTRIES = 1 << 24


def sparse_decode(latents: Float[Tensor, "*batch d_sae"], W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "*batch d"]:
    """Return `latents W_dec`, summed over the active latents only."""
    acts, indices = active_entries(latents.reshape(-1, latents.shape[-1]))
    decoded = torch.nn.functional.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=acts)
    return decoded.view(*latents.shape[:-1], -1)


def leave_one_out(
    latents: Float[Tensor, "*batch d_sae"], left: Float[Tensor, "*batch d"], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "*batch d_sae"]:
    """Return, where a latent is active, the value of it that reconstructs best what the others leave; zero elsewhere.

    `left` is what all latents leave unexplained.
    """
    acts, indices = active_entries(latents.reshape(-1, latents.shape[-1]))
    rows, squares = left.reshape(len(acts), -1), W_dec.square().sum(1).clamp_min(1e-12)
    step = max(1, _ENTRIES // max(1, acts.shape[1] * W_dec.shape[1]))
    along = [
        torch.einsum("rmd,rd->rm", W_dec[part], row) / squares[part]
        for part, row in zip(indices.split(step), rows.split(step), strict=True)
    ]
    scores = torch.where(acts > 0, acts + torch.cat(along), 0.0) if along else acts
    return torch.zeros_like(latents).view(len(acts), -1).scatter_add_(1, indices, scores).view_as(latents)


def half_of_mean(scores: Iterable[Float[Tensor, "rows d_sae"]], n_bins: int = 256) -> Float[Tensor, " d_sae"]:
    """Return thresholds t with `t = E[s | s > t] / 2` for each latent, from histograms of its positive scores.

    The iteration starts at the mean of the scores, from where `t` falls or rises until it settles in a bin. Bins reach
    to the largest score of the first rows, and the last one also has what is larger. A latent that never fires has the
    threshold 0.
    """
    top: Tensor | None = None
    counts, sums = torch.zeros(0, n_bins, dtype=torch.float64), torch.zeros(0, n_bins, dtype=torch.float64)
    for part in scores:
        if top is None:
            top = part.amax(0).double()
            top = torch.where(top > 0, top, top.max()).clamp_min(1e-12)
            counts, sums = counts.new_zeros(len(top), n_bins), sums.new_zeros(len(top), n_bins)
        row, latent = (part > 0).nonzero(as_tuple=True)
        value = part[row, latent].double()
        where = latent * n_bins + (value / top[latent] * n_bins).long().clamp(max=n_bins - 1)
        counts.view(-1).index_add_(0, where, torch.ones_like(value))
        sums.view(-1).index_add_(0, where, value)
    if top is None:
        raise SaeError("no rows were given to choose thresholds from")
    # Sums and counts of the scores in a bin and above it.
    above, n_above = sums.flip(1).cumsum(1).flip(1), counts.flip(1).cumsum(1).flip(1)
    threshold = above[:, 0] / n_above[:, 0].clamp_min(1)
    for _ in range(n_bins):
        place = (threshold / top * n_bins).long().clamp(0, n_bins - 1)[:, None]
        found = (above.gather(1, place) / n_above.gather(1, place).clamp_min(1))[:, 0] / 2
        if torch.equal(found, threshold):
            break
        threshold = found
    return threshold.float()
