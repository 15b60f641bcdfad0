"""The auxiliary loss that revives dead latents: they learn to reconstruct the residual.

AuxK (arXiv 2406.04093, A.2): with the residual `e = x - x_hat` held constant, the largest `k_aux`
dead latents of each row decode, without `b_dec`, to `e_hat`, and `||e - e_hat||^2 / ||e||^2` is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ....shared.core.compute.cores import even_blocks, on_cores
from ...architectures.contract import SINGLE_PROCESS, Collectives
from ...kernels.auxk import auxk_of_rows, residual_of
from ...kernels.gradient import Gradient, add_rows, whole
from ..contract import Batch, Number, Parameters
from .dense import squared

_ROW_BLOCK = 1024


def add_auxk(
    gradients: Mapping[str, Gradient],
    parameters: Parameters,
    batch: Batch,
    W_enc_compute: Float[Tensor, "d_sae d_in"],
    error: Float[Tensor, "batch d_out"],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    coefficient: float,
    topk_of_rows: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    centred: bool,
    across: Collectives = SINGLE_PROCESS,
    n_dead: int | None = None,
) -> Number:
    """Add the auxiliary loss's gradients to `gradients` in place and return the loss, times its coefficient.

    `error` is `x_hat - x`, the negative residual, or `y_hat - y` if other hook points are written. `topk_of_rows` is
    the backend's operation, and `centred` says whether the encoder subtracts `b_dec`. The products are dense over the
    dead latents, in the compute dtype, for one block of rows at a time. With `n_dead`, which must be at least the
    number of dead latents, shapes depend only on it and nothing waits for the device.
    """
    latents = dead.nonzero().squeeze(1) if n_dead is None else torch.argsort((~dead).byte(), stable=True)[:n_dead]
    if not len(latents):
        return 0.0
    scale = across.mean(squared(error))
    weight = torch.where(scale > 0, 2 * coefficient / scale, 0)
    precise, compute = batch.x.dtype, batch.x_compute.dtype
    W_enc, W_dec = W_enc_compute[latents], parameters["W_dec"][latents].to(compute)
    bias = parameters["b_enc"][latents]
    if centred:
        bias = bias - parameters["W_enc"][latents] @ parameters["b_dec"]
    if n_dead is not None:
        bias = bias.where(dead[latents], -torch.inf)

    def residual(e_hat: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return residual_of(e_hat, error, weight, squared, across.over_latents)

    def part_of(rows: slice) -> tuple[Tensor, ...]:
        x = batch.x_compute[rows]
        return auxk_of_rows(x, error[rows], W_enc, W_dec, bias, k_aux, topk_of_rows, residual, across.only_largest)

    blocks = even_blocks(len(error), _ROW_BLOCK)
    by_W_enc = torch.zeros_like(W_enc, dtype=precise)
    by_W_dec = torch.zeros_like(W_dec, dtype=precise)
    by_b_enc, loss = torch.zeros_like(bias), torch.zeros_like(scale)
    for part in on_cores(part_of, blocks) if error.is_cpu and across is SINGLE_PROCESS else map(part_of, blocks):
        for total, addend in zip((loss, by_W_dec, by_W_enc, by_b_enc), part, strict=True):
            total += addend
    add_rows(gradients["W_dec"], latents, by_W_dec)
    if centred:
        by_W_enc = by_W_enc - torch.outer(by_b_enc, parameters["b_dec"])
        whole(gradients["b_dec"]).sub_(across.over_latents(parameters["W_enc"][latents].T @ by_b_enc))
    add_rows(gradients["W_enc"], latents, by_W_enc)
    add_rows(gradients["b_enc"], latents, by_b_enc)
    some = scale > 0 if n_dead is None else (scale > 0) & (across.over_latents(torch.count_nonzero(dead)) > 0)
    return torch.where(some, coefficient * loss / scale, 0)
