"""AuxK's gradients (arXiv 2406.04093, A.2) for a block of rows: dense products over the gathered dead latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def auxk_of_rows(
    x: Float[Tensor, "rows d_in"],
    error: Float[Tensor, "rows d_out"],
    W_enc: Float[Tensor, "latents d_in"],
    W_dec: Float[Tensor, "latents d_out"],
    bias: Float[Tensor, " latents"],
    k_aux: int,
    weight: Float[Tensor, ""],
    topk_of_rows: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    squared: Callable[[Tensor], Tensor],
    only_largest: Callable[[Tensor, int], Tensor] = lambda values, k: values,
    over_latents: Callable[[Tensor], Tensor] = lambda total: total,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows' contributions to the squared error of `e_hat` and to the gradients of `W_dec`, `W_enc`, `b_enc`.

    `error` is `-e` in the parameters' precision; `x` and the matrices are in the compute dtype. `weight` is the
    derivative of the loss with respect to half a squared error. Latents whose bias is minus infinity are ignored. The
    encoder's gradient is with respect to `x`; the caller adds the part from `b_dec`. `topk_of_rows` is the backend's
    operation, `squared` sums squares, and `only_largest` and `over_latents` include the latents of other ranks.
    """
    pre_acts = torch.addmm(bias.to(x.dtype), x, W_enc.T)
    if len(bias) <= k_aux:
        acts = only_largest(pre_acts, k_aux).relu()
    else:
        values, indices = topk_of_rows(pre_acts, k_aux)
        acts = torch.zeros_like(pre_acts).scatter_(1, indices, only_largest(values, k_aux).relu())
    difference = over_latents((acts @ W_dec).to(error.dtype)).add_(error)
    loss = squared(difference)
    g = difference.mul_(weight).to(x.dtype)
    by_acts = (g @ W_dec.T).mul_(acts > 0)
    return loss, acts.T @ g, by_acts.T @ x, by_acts.sum(0, dtype=error.dtype)
