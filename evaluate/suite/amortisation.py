"""The amortisation gap: how much better the decoder's best code at the same L0 reconstructs than the encoder's.

The code is that of non-negative gradient pursuit (Blumensath and Davies, 2008), row by row with as many latents as the
encoder gave the row. A large gap says that the dictionary is better than its encoder; refining the encoder may help.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..metrics.encoding import encode
from ..metrics.held_out import HeldOut
from ..saes.sae_folders import EvaluatedSae

ROWS = 4096
_ENTRIES = 1 << 24


@torch.no_grad()
def amortisation_gap(sae: EvaluatedSae, rows: HeldOut, device: str) -> dict[str, float]:
    """Return the explained variance of pursuit on at most `ROWS` rows, and how far the encoder's is below it."""
    part = rows.subset(ROWS)
    step = max(1, _ENTRIES // sae.sae.d_sae)
    n, by_encoder, by_pursuit = 0, 0.0, 0.0
    total = torch.zeros(sae.sae.d_in, dtype=torch.float64, device=device)
    squares = 0.0
    W_dec, b_dec = sae.sae.W_dec.detach().float(), sae.sae.b_dec.detach().float()
    for block in part.blocks([sae.hook_point], ROWS, device):
        for x in block.activations[sae.hook_point].split(step):
            encoded = encode(sae.sae, x)
            by_encoder += float((x - encoded.x_hat).double().square().sum())
            codes = gradient_pursuit(x - b_dec, W_dec, encoded.l0.long())
            by_pursuit += float((x - b_dec - codes @ W_dec).double().square().sum())
            n, total = n + len(x), total + x.double().sum(0)
            squares += float(x.double().square().sum())
    variance = squares - float(total.square().sum()) / n
    pursued, encoded_share = 1 - by_pursuit / variance, 1 - by_encoder / variance
    return {"pursuit_explained_variance": pursued, "amortisation_gap": pursued - encoded_share}


def gradient_pursuit(
    x: Float[Tensor, "rows d"], W_dec: Float[Tensor, "d_sae d"], l0: Int64[Tensor, " rows"]
) -> Float[Tensor, "rows d_sae"]:
    """Return non-negative codes with at most `l0` entries per row.

    Each step adds to a row's support the latent whose direction has the largest cosine with the residual, then moves
    the whole code along the gradient on its support, by the step that is best for an unbounded code, and clips it at
    zero.
    """
    norms = W_dec.norm(dim=1).clamp_min(1e-12)
    codes, support = x.new_zeros(len(x), len(W_dec)), torch.zeros(len(x), len(W_dec), dtype=torch.bool, device=x.device)
    for step in range(int(l0.max()) if len(l0) else 0):
        gradient = (x - codes @ W_dec) @ W_dec.T
        best = (gradient / norms).masked_fill(support, -torch.inf).max(dim=1)
        grows = (l0 > step) & (best.values > 0)
        support[grows.nonzero()[:, 0], best.indices[grows]] = True
        along = gradient.where(support, 0)
        change = along @ W_dec
        size = (along.square().sum(1) / change.square().sum(1).clamp_min(1e-12)).where(l0 > step, 0)
        codes = (codes + size[:, None] * along).clamp_min(0)
    return codes
