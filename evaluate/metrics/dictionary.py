"""Cosines between decoder directions, within one SAE and between two.

Comparisons leave dead latents out, because their directions stopped training at an arbitrary point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...shared.sae import Sae

MATCH = 0.7
"""Two latents count as the same feature at this decoder cosine or above (arXiv 2501.16615)."""

COSINES = 1 << 25
"""Cosines held at a time: 128 MiB in float32."""


def decoder_directions(sae: Sae) -> Float[Tensor, "d_sae d_out"]:
    """Return the decoder's rows scaled to unit norm; a row of zeros stays zero."""
    return torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)


def encoder_decoder_cosine(sae: Sae) -> Float[Tensor, " d_sae"] | None:
    """Return the cosine of each latent's encoder and decoder directions; None if they are in different spaces."""
    if sae.d_in != sae.d_out or sae.wiring_kind == "transcoder" or "writes" in sae.config:
        return None
    return (torch.nn.functional.normalize(sae.W_enc.detach().float(), dim=0).T * decoder_directions(sae)).sum(dim=1)


def nearest_neighbours(
    directions: Float[Tensor, "d_sae d_out"], n: int
) -> tuple[Float[Tensor, "d_sae n"], Int64[Tensor, "d_sae n"]]:
    """Return the cosines and indices of each row's n nearest other rows, nearest first."""
    n = min(n, len(directions) - 1)
    parts = []
    for rows, cosine in _cosine_blocks(directions, directions):
        cosine[torch.arange(len(cosine)), torch.arange(rows.start, rows.stop)] = -2
        parts.append(cosine.topk(n, dim=1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def best_matches(
    a: Float[Tensor, "d_a d_out"], b: Float[Tensor, "d_b d_out"]
) -> tuple[Float[Tensor, " d_a"], Int64[Tensor, " d_a"]]:
    """Return the cosine and index of the row of `b` nearest to each row of `a`."""
    parts = [cosine.max(dim=1) for _, cosine in _cosine_blocks(a, b)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _cosine_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Float[Tensor, "rows d_b"]]]:
    step = max(1, COSINES // max(len(b), 1))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        yield rows, a[rows] @ b.T


def dictionary_summary(nearest: Float[np.ndarray, " alive"], encoder_decoder: np.ndarray | None) -> dict[str, Any]:
    """Return the distribution over live latents of the cosine to the nearest other decoder direction."""
    if len(nearest) == 0:
        return {}
    quantiles = dict(zip(("p50", "p90", "p99"), np.quantile(nearest, [0.5, 0.9, 0.99]), strict=True))
    summary = {"mean": nearest.mean(), **quantiles, "max": nearest.max()}
    row = {f"max_decoder_cosine_{name}": float(value) for name, value in summary.items()}
    if encoder_decoder is not None and len(encoder_decoder):
        row["encoder_decoder_cosine_mean"] = float(encoder_decoder.mean())
    return row


def compare_directions(
    a: Float[Tensor, "d_a d_out"], b: Float[Tensor, "d_b d_out"], match: float = MATCH
) -> dict[str, float | int | None]:
    """Compare two dictionaries by their live latents' directions; if the widths differ, `b` is the wider one.

    - `mean_max_cosine_ab` and `_ba`: the mean over one dictionary's latents of the largest cosine in the other (MMCS).
    - `shared`: the fraction of `a` with a mutual nearest neighbour in `b` at a cosine of at least `match`.
    - `children_per_parent`, `split_parents`: a latent of `b` is a child of its nearest latent of `a` if their cosine is
      at least `match`. The mean number of children of parents that have any; the fraction of `a` with two or more.
    - `novel`: the fraction of `b` that is a child of no latent of `a`.
    """
    if not len(a) or not len(b):
        return {"n_a": len(a), "n_b": len(b)}
    cosine_ab, index_ab = best_matches(a, b)
    cosine_ba, index_ba = best_matches(b, a)
    mutual = (index_ba[index_ab] == torch.arange(len(a), device=a.device)) & (cosine_ab >= match)
    belongs = cosine_ba >= match
    children = torch.bincount(index_ba[belongs], minlength=len(a))
    parents = children[children > 0].double()
    return {
        "n_a": len(a),
        "n_b": len(b),
        "mean_max_cosine_ab": float(cosine_ab.mean()),
        "mean_max_cosine_ba": float(cosine_ba.mean()),
        "shared": float(mutual.double().mean()),
        "children_per_parent": float(parents.mean()) if len(parents) else None,
        "split_parents": float((children >= 2).double().mean()),
        "novel": float((~belongs).double().mean()),
    }


def live(directions: Float[Tensor, "d_sae d_out"], firings: Int64[np.ndarray, " d_sae"]) -> Tensor:
    """Return the directions of the latents that fired."""
    alive: Bool[np.ndarray, " d_sae"] = firings > 0
    return directions[torch.from_numpy(alive).to(directions.device)]


@torch.inference_mode()
def geometry(
    sae: Sae, firings: Int64[np.ndarray, " d_sae"], n_neighbours: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return one SAE's columns per latent (norm, cosines, nearest neighbours), and a summary over its live latents."""
    directions = decoder_directions(sae)
    cosine, index = nearest_neighbours(directions, n_neighbours)
    columns = {
        "decoder_norm": sae.W_dec.detach().norm(dim=1).cpu().numpy(),
        "neighbours": index.cpu().numpy(),
        "neighbour_cosines": cosine.cpu().numpy(),
    }
    alive = firings > 0
    encoder_decoder = encoder_decoder_cosine(sae)
    if encoder_decoder is not None:
        columns["encoder_decoder_cosine"] = encoder_decoder.cpu().numpy()
    nearest, _ = nearest_neighbours(live(directions, firings), 1) if alive.sum() > 1 else (torch.zeros(0, 1), None)
    own = columns["encoder_decoder_cosine"][alive] if encoder_decoder is not None else None
    return columns, dictionary_summary(nearest[:, 0].cpu().numpy(), own)
