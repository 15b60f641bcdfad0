"""Normalisation of each row by its own statistics, which some SAEs make before encoding and undo after decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_EPSILON = 1e-5
"""What layer_norm adds to a row's standard deviation, in SAELens and in OpenAI's sparse_autoencoder."""


class RowStatistics(NamedTuple):
    """What undoes a row's normalisation: `y * scale + shift`."""

    scale: Float[Tensor, "*batch 1"]
    shift: Float[Tensor, "*batch 1"]


def normalize_rows(x: Float[Tensor, "*batch d"], kind: str) -> tuple[Float[Tensor, "*batch d"], RowStatistics]:
    """Return rows normalised as SAELens's `normalize_activations = kind` does, and what undoes it.

    `layer_norm` subtracts a row's mean and divides by its standard deviation (unbiased, plus 1e-5, which undoing leaves
    out as SAELens and OpenAI do). `constant_norm_rescale` gives each row the norm sqrt(d); a row of zeros stays as is.
    """
    if kind == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        deviation = centred.std(dim=-1, keepdim=True)
        return centred / (deviation + _EPSILON), RowStatistics(deviation, mean)
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return x / scale.clamp_min(torch.finfo(x.dtype).tiny), RowStatistics(scale, torch.zeros_like(scale))
