"""Reconstruction metrics from float64 sums kept per document group.

Every metric is a function of sums over rows, so the metrics of all documents and of every bootstrap resample are
computed from the same few arrays. The definitions are those of `evals.py` in SAELens 6.54; `docs/evaluation.md`
compares them.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .bootstrap import Sums

SMALL_NORM = 1e-4
"""`l2_ratio` takes the norm of a row with a smaller norm as one, as SAELens does."""

ROW_SUMS = ("squared_error", "cosine", "l2_ratio", "squared_norm_out", "dot", "l0", "l1")


class InputSums:
    """Sums over the rows that SAEs reconstruct, shared by all SAEs with the same target."""

    def __init__(self, n_groups: int, d_in: int, device: str = "cpu"):
        self._count = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self._sum = torch.zeros(n_groups, d_in, dtype=torch.float64, device=device)
        self._squared_norm = torch.zeros(n_groups, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "rows d_in"], group: Int64[Tensor, " rows"]) -> None:
        """Add rows, converting them to float64 before squaring and summing."""
        wide = x.to(torch.float64)
        self._count.index_add_(0, group, torch.ones_like(wide[:, 0]))
        self._sum.index_add_(0, group, wide)
        self._squared_norm.index_add_(0, group, wide.square().sum(dim=1))

    def sums(self) -> dict[str, Float[np.ndarray, "groups ..."]]:
        """Return the sums per group: `n_rows`, `x` and `squared_norm`."""
        names = {"n_rows": self._count, "x": self._sum, "squared_norm": self._squared_norm}
        return {name: value.cpu().numpy() for name, value in names.items()}


class ReconstructionSums:
    """Sums over the rows of one SAE's reconstructions."""

    def __init__(self, n_groups: int, device: str = "cpu"):
        self._sums = torch.zeros(n_groups, len(ROW_SUMS), dtype=torch.float64, device=device)

    def add(
        self,
        x: Float[Tensor, "rows d_in"],
        x_hat: Float[Tensor, "rows d_in"],
        l0: Float[Tensor, " rows"],
        l1: Float[Tensor, " rows"],
        group: Int64[Tensor, " rows"],
    ) -> None:
        """Add rows: compute each row's terms in float32 and sum them in float64."""
        squared_norm_out = x_hat.square().sum(dim=1)
        norm_in, norm_out = x.norm(dim=1), squared_norm_out.sqrt()
        dot = (x * x_hat).sum(dim=1)
        tiny = torch.finfo(torch.float32).tiny
        columns = {
            "squared_error": (x - x_hat).square().sum(dim=1),
            "cosine": dot / (norm_in * norm_out).clamp_min(tiny),
            "l2_ratio": norm_out / torch.where(norm_in < SMALL_NORM, 1.0, norm_in),
            "squared_norm_out": squared_norm_out,
            "dot": dot,
            "l0": l0,
            "l1": l1,
        }
        rows = torch.stack([columns[name].to(torch.float64) for name in ROW_SUMS], dim=1)
        self._sums.index_add_(0, group, rows)

    def sums(self) -> dict[str, Float[np.ndarray, " groups"]]:
        """Return the sums per group, by name."""
        return dict(zip(ROW_SUMS, self._sums.cpu().numpy().T, strict=True))


def reconstruction_metrics(sums: Sums) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Return every metric from sums over rows; the first axis is the resamples, or has length one."""
    n = sums["n_rows"]
    variance = sums["squared_norm"] / n - np.square(sums["x"] / n[:, None]).sum(axis=1)
    mse = sums["squared_error"] / n
    with np.errstate(divide="ignore", invalid="ignore"):
        fvu = mse / variance
        bias = sums["squared_norm_out"] / sums["dot"]
    return {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": mse,
        "cossim": sums["cosine"] / n,
        "l2_ratio": sums["l2_ratio"] / n,
        "relative_reconstruction_bias": bias,
        "l0": sums["l0"] / n,
        "l1": sums["l1"] / n,
    }
