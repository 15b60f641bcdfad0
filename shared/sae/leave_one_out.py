"""Refine a trained SAE: drop the latents that the rest of the reconstruction does without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import SaeError
from .formats.folding import as_jumprelu
from .refinement import half_of_mean, leave_one_out, sparse_decode
from .sae import Sae


@torch.no_grad()
def refined(sae: Sae, rows: Iterable[Float[Tensor, "rows d_in"]]) -> Sae:
    """Return a trained SAE with leave-one-out refinement, its thresholds chosen from rows without knowing any truth.

    Latents fire as before, are then set to the values that reconstruct best what the others leave, and stay where they
    are above half of their mean.

    Raises:
        SaeError: it is no autoencoder, or it chooses otherwise than by thresholds, as a TopK SAE does.
    """
    if sae.wiring_kind != "sae" or sae.normalizes_rows:
        raise SaeError(f"leave_one_out refines autoencoders that take rows as they are; this is a {sae.architecture}")
    parts = as_jumprelu(sae.parts(), "leave_one_out")
    latents = ((sae.encode(x), x) for x in rows)
    scores = (
        leave_one_out(f, x.to(f.dtype) - sparse_decode(f, sae.W_dec) - sae.b_dec, sae.W_dec).cpu() for f, x in latents
    )
    threshold = half_of_mean(scores).to(sae.device)
    tensors = dict(parts.tensors) | {"first_threshold": parts.tensors["threshold"], "threshold": threshold}
    parts = replace(parts, architecture="leave_one_out", tensors=tensors)
    found = Sae(
        parts.architecture, parts.tensors, hook_point=sae.hook_point, config=parts.config, metadata=sae.metadata
    )
    return found.to(sae.device).eval()
