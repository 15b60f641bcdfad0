"""The auxiliary loss that revives dead latents: they learn to reconstruct what the others leave.

AuxK (arXiv 2406.04093, A.2): with the residual `e = x - x_hat` held constant, the largest `k_aux`
dead latents of each row decode, without `b_dec`, to `e_hat`, and `||e - e_hat||^2 / ||e||^2` is added.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .base import Parameters

_ROW_BLOCK = 1024


def add_auxk(
    gradients: Parameters,
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    coefficient: float,
) -> float:
    """Add the auxiliary loss's gradients to `gradients` in place and return the loss, times its coefficient.

    `x` is the batch without the centring by `b_dec`. Few latents are dead, so the products are
    dense over those, a block of rows at a time.
    """
    latents = dead.nonzero().squeeze(1)
    scale = float(residual.square().sum())
    if not len(latents) or not scale > 0:
        return 0.0
    W_enc, W_dec = parameters["W_enc"][latents], parameters["W_dec"][latents]
    bias = parameters["b_enc"][latents] - W_enc @ parameters["b_dec"]
    by_W_enc, by_W_dec, by_b_enc = torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(bias)
    k_aux = min(k_aux, len(latents))
    loss = 0.0
    for start in range(0, len(x), _ROW_BLOCK):
        rows = slice(start, start + _ROW_BLOCK)
        values, indices = torch.addmm(bias, x[rows], W_enc.T).topk(k_aux, dim=1, sorted=False)
        acts = x.new_zeros(len(values), len(latents)).scatter_(1, indices, values.relu())
        difference = acts @ W_dec - residual[rows]
        loss += float(difference.square().sum())
        g = difference.mul_(2 * coefficient / scale)
        by_acts = (g @ W_dec.T) * (acts > 0)
        by_W_dec.addmm_(acts.T, g)
        by_W_enc.addmm_(by_acts.T, x[rows])
        by_b_enc += by_acts.sum(0)
    gradients["W_dec"][latents] += by_W_dec
    gradients["W_enc"][latents] += by_W_enc - torch.outer(by_b_enc, parameters["b_dec"])
    gradients["b_enc"][latents] += by_b_enc
    gradients["b_dec"] -= W_enc.T @ by_b_enc
    return coefficient * loss / scale
