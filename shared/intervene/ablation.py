"""What a metric loses if a latent is set to another value: measured, one pass for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..core.errors import InterventionError
from .attached import Attached, check_latent
from .metrics import MetricLike, evaluate_metric
from .run import Run
from .scores import Scores
from .spliced_model import SplicedModel

Replacement = Literal["zero", "mean", "resample"]


@torch.no_grad()
def ablate(
    lm: SplicedModel,
    run: Run,
    metric: MetricLike,
    replacement: Replacement = "zero",
    *,
    by: str = "position",
    only: Mapping[str, Iterable[int]] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Scores:
    """Return what `SaeModel.ablate` describes."""
    if replacement not in ("zero", "mean", "resample") or by not in ("position", "latent"):
        raise InterventionError(
            f"replacement is '{replacement}' and by '{by}'; expected zero, mean or resample, and position or latent"
        )
    if batch_size < 1:
        raise InterventionError(f"batch_size is {batch_size}; expected at least 1")
    chosen = {lm.at(name).name: sorted({int(latent) for latent in some}) for name, some in (only or {}).items()}
    texts = torch.arange(len(run))
    clean = evaluate_metric(metric, run, run.logits, texts)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, latents in run.latents.items():
        if only is not None and name not in chosen:
            continue
        number, one, _ = run.site(name)
        indices, values = latents.indices().cpu(), latents.values().cpu()
        if only is not None:
            for latent in chosen[name]:
                check_latent(one, latent)
            kept = torch.isin(indices[2], torch.tensor(chosen[name], dtype=torch.long))
            indices, values = indices[:, kept], values[kept]
        change = _replaced(run, name, indices, values, replacement, generator) - values
        node = indices if by == "position" else indices[[0, 2]]
        nodes, belongs = torch.unique(node, dim=1, return_inverse=True)
        effects = torch.zeros(nodes.shape[1], dtype=clean.dtype)
        for start in range(0, nodes.shape[1], batch_size):
            part = torch.arange(start, min(start + batch_size, nodes.shape[1]))
            rows = nodes[0, part]
            mine = (belongs >= start) & (belongs < start + batch_size)
            additions = written(run, number, one, belongs[mine] - start, indices[:, mine], change[mine], len(part))
            logits = lm.forward(run.tokens[rows], run.lengths[rows], additions=additions).logits
            effects[part] = clean[rows].cpu() - evaluate_metric(metric, run, logits, rows).cpu()
        size = (*run.tokens.shape, one.sae.d_sae) if by == "position" else (len(run), one.sae.d_sae)
        found[name] = torch.sparse_coo_tensor(nodes, effects, size, is_coalesced=True, check_invariants=False)
    return Scores(clean, found, {})


def _replaced(
    run: Run,
    name: str,
    indices: Int64[Tensor, "3 n"],
    values: Float[Tensor, " n"],
    replacement: Replacement,
    generator: torch.Generator,
) -> Float[Tensor, " n"]:
    """Return what each latent is set to."""
    if replacement == "zero":
        return torch.zeros_like(values)
    latents = run.latents[name].cpu()
    if replacement == "mean":
        flat = latents.indices()[2]
        total = torch.zeros(latents.shape[2], dtype=values.dtype).index_add_(0, flat, latents.values())
        return (total / int(run.usable.sum()))[indices[2]]
    tokens = run.usable.nonzero().cpu()
    drawn = tokens[torch.randint(len(tokens), (indices.shape[1],), generator=generator)]
    return latents.to_dense()[drawn[:, 0], drawn[:, 1], indices[2]]


def written(
    run: Run,
    number: int,
    one: Attached,
    row: Int64[Tensor, " n"],
    indices: Int64[Tensor, "3 n"],
    change: Float[Tensor, " n"],
    n_rows: int,
) -> dict[tuple[int, int], Float[Tensor, "rows context d"]]:
    """Return what changes of latents, each in its row of a batch, add at each hook point that the SAE writes."""
    device, scale = one.sae.device, run.scale(number)
    if scale is not None:
        change = change * scale[indices[0].to(device), indices[1].to(device)].to(change)
    group, latent = indices[2] // one.groups[0].size, indices[2] % one.groups[0].size
    found = {}
    for write, point in enumerate(one.writes):
        total = torch.zeros(n_rows, run.tokens.shape[1], point.d_in, dtype=change.dtype, device=device)
        for which in range(len(one.groups)):
            decoder, mine = one.decoder(which, write), group == which
            if decoder is not None and bool(mine.any()):
                places = row[mine].to(device), indices[1, mine].to(device)
                total.index_put_(places, change[mine].to(device)[:, None] * decoder[latent[mine]], accumulate=True)
        found[number, write] = total
    return found
