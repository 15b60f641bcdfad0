"""Find the latents that tell two sets of texts apart, then confirm by ablation what they do: "find, then confirm"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.core.errors import InterventionError
from ...shared.intervene.metrics import LogProbability, MetricLike
from ...shared.intervene.run import Run
from ...shared.intervene.sae_model import SaeModel
from .statistics import auc, auc_interval, mean_interval, q_values, rank_test

Pool = Literal["mean", "max", "last"]


def contrast(
    lm: SaeModel,
    a: Sequence[str],
    b: Sequence[str],
    *,
    metric: MetricLike | None = None,
    pool: Pool = "mean",
    top: int = 20,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Return the latents that tell two sets of texts apart best, with their effect by ablation: one row each.

    A text has one number per latent: its activation's mean or maximum over the tokens, or that at the last. Over all
    latents that fire in some text, a row has the means of both sets and their `difference`, the `auc` with its 95%
    interval, the `p` of a rank test, and `q`, the false discovery rate at which it is significant among all latents
    tested. For the `top` latents by AUC, `effect_a` and `effect_b` are what the metric loses, on average over the
    texts of each set, if the latent is ablated at all tokens, with 95% intervals over texts.

    Args:
        lm: the model with its SAEs.
        a: texts of one kind.
        b: texts of the other.
        metric: by default the mean log-probability of a text's tokens, in nats.
        pool: how a text's tokens become one number.
        top: rows to return.
        batch_size: texts, or ablations, that run at once.

    Raises:
        InterventionError: a set has fewer than two texts, or no latent fires.
    """
    if min(len(a), len(b)) < 2:
        raise InterventionError(f"a contrast needs at least two texts on each side, got {len(a)} and {len(b)}")
    if pool not in ("mean", "max", "last"):
        raise InterventionError(f"pool is '{pool}'; expected mean, max or last")
    texts = [*a, *b]
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    pooled: dict[str, list[np.ndarray]] = {name: [] for name in lm.saes}
    for part in parts:
        run = lm.run(part)
        for name in lm.saes:
            pooled[name].append(_pooled(run, name, pool))
    rows = [row for name, values in pooled.items() for row in _separation(name, np.concatenate(values), len(a))]
    if not rows:
        raise InterventionError("no latent fires in any of the texts")
    for row, q in zip(rows, q_values(np.array([row["p"] for row in rows])), strict=True):
        row["q"] = float(q)
    rows.sort(key=lambda row: (-abs(row["auc"] - 0.5), -abs(row["difference"])))
    best = rows[:top]
    _confirm(lm, best, parts, len(a), metric or LogProbability(start=1, mean=True), batch_size)
    return best


def _pooled(run: Run, name: str, pool: Pool) -> Float[np.ndarray, "texts d_sae"]:
    """Return one number per text and latent."""
    dense, usable = run.latents[name].to_dense(), run.usable.to(run.latents[name].device)
    if pool == "max":
        found = dense.amax(dim=1)
    elif pool == "mean":
        found = dense.sum(dim=1) / usable.sum(dim=1, keepdim=True).clamp_min(1)
    else:
        last = (run.lengths - 1).to(dense.device)
        found = dense[torch.arange(len(run), device=dense.device), last]
    return found.double().cpu().numpy()


def _separation(name: str, values: Float[np.ndarray, "texts d_sae"], n_a: int) -> list[dict[str, Any]]:
    """Return how well each latent that fires tells the first `n_a` texts from the others."""
    alive = np.flatnonzero(values.any(axis=0))
    first, second = values[:n_a, alive], values[n_a:, alive]
    if not len(alive):
        return []
    areas, p = auc(first, second), rank_test(first, second)
    rows = []
    for number, latent in enumerate(alive):
        low, high = auc_interval(float(areas[number]), len(first), len(second))
        means = float(first[:, number].mean()), float(second[:, number].mean())
        rows.append(
            {"hook_point": name, "latent": int(latent), "mean_a": means[0], "mean_b": means[1]}
            | {"difference": means[0] - means[1], "auc": float(areas[number]), "auc_low": low, "auc_high": high}
            | {"p": float(p[number])}
        )
    return rows


def _confirm(
    lm: SaeModel,
    rows: list[dict[str, Any]],
    parts: Sequence[Sequence[str]],
    n_a: int,
    metric: MetricLike,
    batch_size: int,
) -> None:
    """Add to each row what the metric loses without its latent, over the texts of each set."""
    only: dict[str, list[int]] = {}
    for row in rows:
        only.setdefault(row["hook_point"], []).append(row["latent"])
    effects: dict[str, list[Tensor]] = {name: [] for name in only}
    for part in parts:
        found = lm.ablate(lm.run(part), metric, by="latent", only=only, batch_size=batch_size)
        for name in only:
            effects[name].append(found.latents[name].to_dense())
    whole = {name: torch.cat(some).double().cpu().numpy() for name, some in effects.items()}
    for row in rows:
        values = whole[row["hook_point"]][:, row["latent"]]
        for side, some in (("a", values[:n_a]), ("b", values[n_a:])):
            interval = mean_interval(some)
            row[f"effect_{side}"] = float(some.mean())
            row[f"effect_{side}_low"], row[f"effect_{side}_high"] = interval if interval else (None, None)
