"""AuxK's gradients (arXiv 2406.04093, A.2) for a block of rows: dense products over the gathered dead latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def residual_of(
    e_hat: Float[Tensor, "rows d_out"],
    error: Float[Tensor, "rows d_out"],
    weight: Float[Tensor, ""],
    squared: Callable[[Tensor], Tensor],
    over_latents: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows d_out"]]:
    """Return the squared error of `e_hat` and, in its dtype, the gradient with respect to it.

    `error` is `-e` in the parameters' precision. `weight` is the derivative of the loss with respect to half a squared
    error. `squared` sums squares, and `over_latents` includes the latents of other ranks.
    """
    difference = over_latents(e_hat.to(error.dtype)).add_(error)
    return squared(difference), difference.mul_(weight).to(e_hat.dtype)


def auxk_of_rows(
    x: Float[Tensor, "rows d_in"],
    error: Float[Tensor, "rows d_out"],
    W_enc: Float[Tensor, "latents d_in"],
    W_dec: Float[Tensor, "latents d_out"],
    bias: Float[Tensor, " latents"],
    k_aux: int,
    topk_of_rows: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    residual: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    only_largest: Callable[[Tensor, int], Tensor] = lambda values, k: values,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows' contributions to the squared error of `e_hat` and to the gradients of `W_dec`, `W_enc`, `b_enc`.

    `error` is in the parameters' precision; `x` and the matrices are in the compute dtype. Latents whose bias is minus
    infinity are ignored. The encoder's gradient is with respect to `x`; the caller adds the part from `b_dec`.
    `topk_of_rows` is the backend's operation, `residual` returns what `residual_of` does, given `e_hat` and `error`,
    and `only_largest` includes the latents of other ranks.
    """
    pre_acts = torch.addmm(bias.to(x.dtype), x, W_enc.T)
    if len(bias) <= k_aux:
        acts = only_largest(pre_acts, k_aux).relu()
    else:
        values, indices = topk_of_rows(pre_acts, k_aux)
        acts = torch.zeros_like(pre_acts).scatter_(1, indices, only_largest(values, k_aux).relu())
    loss, g = residual(acts @ W_dec, error)
    by_acts = (g @ W_dec.T).mul_(acts > 0)
    return loss, acts.T @ g, by_acts.T @ x, by_acts.sum(0, dtype=error.dtype)
