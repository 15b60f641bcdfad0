"""Norm factors of Language-Model-SAEs folded into weights, and thresholds of latents weighed by decoder norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ....core.errors import SaeError

TOKEN_WISE = "constant_norm_rescale"
"""SAELens's name of `norm_activation = "token-wise"`: each row is scaled to the norm sqrt(d), and back afterwards."""


def token_wise(reads: str, writes: str, where: str) -> str:
    """Return how an SAE with `norm_activation = "token-wise"` normalises rows.

    Raises:
        SaeError: it is a transcoder, whose output is scaled by the norm of what it is to estimate.
    """
    if reads != writes:
        raise SaeError(
            f"{where} is a transcoder with norm_activation 'token-wise', whose output is scaled by the norm of the row "
            "that it estimates; expected 'dataset-wise' or 'inference'"
        )
    return TOKEN_WISE


def positive(value: object, what: str) -> float:
    """Return a number above zero, or raise `SaeError`, whose message begins with `what`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise SaeError(f"{what} {value!r}, expected a number above 0")
    return float(value)


def fold_norms(
    tensors: Mapping[str, Tensor], norms: tuple[float, float] | None, raw_threshold: bool = False
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights that take and return activations as they are, and what was folded, in words.

    With s = sqrt(d) / norm of what is read and of what is written, latents are those of `x s_in`, and reconstructions
    are divided by s_out. With `raw_threshold` the thresholds are of the scale of `x` and are multiplied by s_in.
    """
    if norms is None:
        return dict(tensors), ()
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    s_in, s_out = W_enc.shape[0] ** 0.5 / norms[0], W_dec.shape[1] ** 0.5 / norms[1]
    folded = dict(tensors) | {"W_enc": W_enc * s_in, "W_dec": W_dec / s_out, "b_dec": tensors["b_dec"] / s_out}
    if raw_threshold:
        folded["threshold"] = tensors["threshold"] * s_in
    return folded, (
        f"the factor {s_in:.4g} of what is read (sqrt(d) over its average norm {norms[0]:.4g}) into W_enc",
        f"the factor {s_out:.4g} of what is written (average norm {norms[1]:.4g}) into W_dec and b_dec",
    )


def weighted_threshold(threshold: Tensor, W_dec: Tensor) -> Tensor:
    """Return the thresholds of latents that fire where `latent ||W_dec||` is above the given ones.

    Raises:
        SaeError: a decoder is zero, and its latent would fire never or always.
    """
    norms = torch.linalg.vector_norm(W_dec.float(), dim=tuple(range(1, W_dec.ndim)))
    return threshold / norms.clamp_min(torch.finfo(torch.float32).tiny)
