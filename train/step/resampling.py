"""Resampling of dead latents: they restart at inputs that are reconstructed badly (Anthropic, 2023)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..architectures.contract import Parameters
from .step_mode import Weights

_ENCODER_SHARE = 0.2


def resample_dead_latents(
    weights: Weights,
    initial: Parameters,
    dead: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    error: Float[Tensor, "batch d_out"],
    generator: torch.Generator,
) -> int:
    """Reinitialise dead latents in parameters and moments; return how many there were.

    Inputs are drawn with probability proportional to their squared loss, without replacement while there are enough. A
    latent's decoder row becomes the direction of the input's target from `b_dec`, with the mean norm of live latents'
    decoder rows. Its encoder row becomes the direction of the input, with a fifth of the mean norm of live latents'
    encoder rows. Everything else is taken from `initial`.
    """
    parameters, latents = weights.parameters, dead.nonzero().squeeze(1)
    losses = error.square().sum(1).square().double().cpu()
    if not len(latents) or not float(losses.sum()) > 0:
        return 0
    few = int(torch.count_nonzero(losses)) < len(latents)
    rows = torch.multinomial(losses, len(latents), replacement=few, generator=generator).to(x.device)
    starts = {"W_enc": x[rows] - parameters["b_dec"] if target is x else x[rows]}
    starts["W_dec"] = target[rows] - parameters["b_dec"]
    for name, tensor in parameters.items():
        if tensor.shape[0] != len(dead) or name in ("b_dec", "W_skip"):
            continue
        if name in ("W_enc", "W_dec"):
            living = tensor[~dead] if not bool(dead.all()) else initial[name].to(tensor.device)
            share = _ENCODER_SHARE if name == "W_enc" else 1.0
            tensor[latents] = torch.nn.functional.normalize(starts[name], dim=1) * (living.norm(dim=1).mean() * share)
        else:
            tensor[latents] = initial[name].to(tensor.device)[latents]
        weights.exp_avg[name][latents] = 0
        weights.exp_avg_sq[name][latents] = 0
    return len(latents)
