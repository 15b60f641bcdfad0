"""AuxK across layers: dead latents learn to reconstruct the residuals of all targets that they write.

With the residuals `e_m = y_m - y_hat_m` held constant, the largest `k_aux` dead latents of each row, of all layers
together, decode without `b_dec` to `e_hat_m`, and `sum_m ||e_m - e_hat_m||^2 / sum_m ||e_m||^2` is added
(arXiv 2406.04093, A.2, summed over targets).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..contract import Collectives, Number, Parameters
from ..parts.dense import squared
from .layers import LayerInput, Layers, squared_errors

_ROW_BLOCK = 1024


def add_auxk_across(
    gradients: Parameters,
    layers: Layers,
    parameters: Parameters,
    inputs: Sequence[LayerInput],
    errors: Sequence[Float[Tensor, "batch d_out"]],
    dead: Bool[Tensor, " all_latents"],
    k_aux: int,
    coefficient: float,
    across: Collectives,
) -> Number:
    """Add the auxiliary loss's gradients to `gradients` in place and return the loss, times its coefficient.

    `errors` are the negative residuals. Products are dense over the dead latents, in the compute dtype, for one block
    of rows at a time.
    """
    latents = dead.nonzero().squeeze(1)
    if not len(latents):
        return 0.0
    compute, precise = inputs[0].x_compute.dtype, inputs[0].x.dtype
    by_layer = [latents[latents // layers.d_sae == i] - i * layers.d_sae for i in range(layers.n)]
    parts = list(torch.arange(len(latents), device=latents.device).split([len(part) for part in by_layer]))
    scale = across.mean(squared_errors(errors))
    weight = torch.where(scale > 0, 2 * coefficient / scale, 0)
    W_enc = [one.W_enc_compute[part] for one, part in zip(inputs, by_layer, strict=True)]
    b_enc = [one.b_enc[part].to(compute) for one, part in zip(inputs, by_layer, strict=True)]
    # For each target: the rows of W_dec with which dead latents write it. They belong to the first of the dead latents.
    rows_of = [
        torch.cat([part + layers.decoder(layer, target).start for layer, part in enumerate(by_layer[: target + 1])])
        for target in range(layers.n)
    ]
    W_dec = [parameters["W_dec"][rows].to(compute) for rows in rows_of]
    by_W_enc = [torch.zeros_like(W, dtype=precise) for W in W_enc]
    by_W_dec = [torch.zeros_like(W, dtype=precise) for W in W_dec]
    by_b_enc = torch.zeros(len(latents), dtype=precise, device=latents.device)
    loss = torch.zeros_like(scale)
    for start in range(0, len(errors[0]), _ROW_BLOCK):
        block = slice(start, start + _ROW_BLOCK)
        pre_acts = [torch.addmm(b, one.x_compute[block], W.T) for one, W, b in zip(inputs, W_enc, b_enc, strict=True)]
        acts = _largest(torch.cat(pre_acts, dim=1), k_aux)
        by_acts = torch.zeros_like(acts, dtype=precise)
        for target, W in enumerate(W_dec):
            written = acts[:, : len(W)]
            difference = (written @ W).to(precise).add_(errors[target][block])
            loss += squared(difference)
            g = difference.mul_(weight).to(compute)
            by_acts[:, : len(W)] += g @ W.T
            by_W_dec[target] += written.T @ g
        by_acts.mul_(acts > 0)
        by_b_enc += by_acts.sum(0)
        for part, one, total in zip(parts, inputs, by_W_enc, strict=True):
            total += by_acts[:, part].to(compute).T @ one.x_compute[block]
    gradients["b_enc"][latents] += by_b_enc
    for layer, (part, total) in enumerate(zip(by_layer, by_W_enc, strict=True)):
        gradients["W_enc"][part + layers.latents(layer).start] += total
    for rows, total in zip(rows_of, by_W_dec, strict=True):
        gradients["W_dec"][rows] += total
    return torch.where(scale > 0, coefficient * loss / scale, 0)


def _largest(pre_acts: Float[Tensor, "batch n_dead"], k_aux: int) -> Float[Tensor, "batch n_dead"]:
    """Return the positive ones among each row's `k_aux` largest, and zeros elsewhere."""
    if pre_acts.shape[1] <= k_aux:
        return pre_acts.relu()
    values, indices = pre_acts.topk(k_aux, dim=1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(1, indices, values.relu())
