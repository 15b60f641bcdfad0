"""Dictionaries without training, as TopK SAEs: principal components, and the hook point's own basis.

A direction and its opposite are two latents, because latents are not negative. The k largest of them give the best
reconstruction from k directions of an orthonormal basis. Their k are the L0s of the SAEs that they are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ...shared.sae import Sae
from ...shared.store import ActivationStore
from ..metrics.encoding import encode, rows_at_a_time
from ..metrics.held_out import HeldOut, training_rows
from ..saes.sae_folders import EvaluatedSae

FITTED_ROWS = 131_072
"""Most training rows that a mean and principal components are computed from."""
L0_ROWS = 4096
_APART = math.log(1.25)
"""SAEs whose L0s differ by less than this factor share a baseline."""


def baseline_saes(
    saes: Sequence[EvaluatedSae], rows: HeldOut, kinds: Sequence[str], block_rows: int, device: str
) -> list[EvaluatedSae]:
    """Return the baselines of `kinds` (`pca`, `neurons`) for the SAEs that reconstruct the one hook point they read.

    They are fitted on training rows of the store that `rows`, the held-out rows, belong to.
    """
    alone = [sae for sae in saes if sae.hook_point == sae.target and sae.sae.wiring_kind == "sae"]
    found: list[EvaluatedSae] = []
    for hook_point in dict.fromkeys(sae.hook_point for sae in alone if kinds):
        together = [sae for sae in alone if sae.hook_point == hook_point]
        mean, covariance = moments(rows.store, hook_point, block_rows)
        for kind in kinds:
            basis = principal_components(covariance) if kind == "pca" else torch.eye(len(mean), dtype=torch.float64)
            for k in matched_k(together, rows, block_rows, device):
                sae = signed_topk(basis, mean, min(k, len(mean)), hook_point, kind).to(device).eval()
                name = f"baseline-{kind}-{hook_point}-k{k}"
                found.append(EvaluatedSae(name, Path(name), sae, hook_point, hook_point, made_as=kind))
    return found


def moments(
    store: ActivationStore, hook_point: str, block_rows: int
) -> tuple[Float64[Tensor, " d_in"], Float64[Tensor, "d_in d_in"]]:
    """Return the mean and the covariance of training rows, of at most `FITTED_ROWS` that are spread evenly."""
    d_in = store.d_in(hook_point)
    total, squares = torch.zeros(d_in, dtype=torch.float64), torch.zeros(d_in, d_in, dtype=torch.float64)
    n = 0
    origin = None
    for block in training_rows(store, FITTED_ROWS).blocks([hook_point], block_rows):
        x = block.activations[hook_point].double()
        origin = x.mean(0) if origin is None else origin  # a mean far from zero would cost digits
        centred = x - origin
        total += centred.sum(0)
        squares += centred.T @ centred
        n += len(x)
    assert origin is not None
    mean = total / n
    return origin + mean, squares / n - torch.outer(mean, mean)


def principal_components(covariance: Float64[Tensor, "d_in d_in"]) -> Float64[Tensor, "d_in d_in"]:
    """Return the principal components as rows, the one of the largest variance first."""
    _, vectors = torch.linalg.eigh(covariance)
    return vectors.T.flip(0)


def signed_topk(
    basis: Float64[Tensor, "n d_in"], mean: Float64[Tensor, " d_in"], k: int, hook_point: str, kind: str
) -> Sae:
    """Return the TopK SAE whose latents are the directions of a basis and their opposites, centred on a mean."""
    W_dec = torch.cat([basis, -basis]).float()
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(len(W_dec)), "W_dec": W_dec, "b_dec": mean.float()}
    return Sae("topk", tensors, hook_point=hook_point, config={"k": k, "architecture": kind})


def matched_k(saes: Sequence[EvaluatedSae], rows: HeldOut, block_rows: int, device: str) -> list[int]:
    """Return the rounded L0s of SAEs on at most `L0_ROWS` held-out rows, without those close to a smaller one."""
    found: list[int] = []
    for l0 in sorted(_l0(sae, rows.subset(L0_ROWS), block_rows, device) for sae in saes):
        k = max(1, round(l0))
        if not found or math.log(k / found[-1]) > _APART:
            found.append(k)
    return found


@torch.no_grad()  # the store keeps buffers, which later reads outside of inference mode must be able to fill
def _l0(sae: EvaluatedSae, rows: HeldOut, block_rows: int, device: str) -> float:
    active = 0.0
    for block in rows.blocks([sae.hook_point], block_rows, device):
        x: Float[Tensor, "rows d_in"] = block.activations[sae.hook_point]
        active += sum(float(encode(sae.sae, part).l0.sum()) for part in x.split(rows_at_a_time(sae.sae)))
    return active / rows.n_rows
