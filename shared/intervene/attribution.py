"""Estimate what each latent does to a metric from gradients, in a few passes whatever the number of latents.

`attribution_patching` (Nanda, 2023; Marks et al., arXiv 2403.19647) is first-order: the gradient of the metric with
respect to a latent, times how far it is from its baseline. `integrated_gradients` (Sundararajan et al., arXiv
1703.01365) averages the gradient along a straight path from baseline to activations, by Gauss-Legendre quadrature.

On the classical path all latents move together, and the average is of models without most of them: it says less of what
one latent's ablation does than the plain gradient. So the active latents of an SAE are divided at random into groups,
each with a path of its own, on which the other groups stay as they are. Within a group, the scores add up to what its
ablation does. One group is the classical path; with as many groups as latents, each is ablated alone.

Gradients are those of the whole model: with errors kept, a latent acts on what comes after it as its ablation would,
through other SAEs' errors too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..core.errors import InterventionError
from .ablation import written
from .attached import Attached
from .metrics import Metric, MetricLike, evaluate_metric
from .run import Run
from .scores import Scores
from .spliced_model import SplicedModel

Method = Literal["attribution_patching", "integrated_gradients"]
_ENTRIES = 1 << 24


def attribute(
    lm: SplicedModel,
    run: Run,
    metric: MetricLike,
    method: Method = "attribution_patching",
    steps: int = 2,
    groups: int = 32,
    baseline: Mapping[str, Float[Tensor, " d_sae"]] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Scores:
    """Return what `SaeModel.attribute` describes."""
    if method not in ("attribution_patching", "integrated_gradients"):
        raise InterventionError(f"method is '{method}'; expected attribution_patching or integrated_gradients")
    if min(steps, groups, batch_size) < 1:
        raise InterventionError(
            f"steps is {steps}, groups {groups} and batch_size {batch_size}; expected at least 1 of each"
        )
    patching = method == "attribution_patching"
    if patching and isinstance(metric, Metric) and metric.flat_at_clean:
        raise InterventionError(
            f"the gradient of {type(metric).__name__} is zero at the clean run; use method='integrated_gradients'"
        )
    chosen = {lm.at(name).name: values for name, values in (baseline or {}).items()}
    value, grads = _gradients(lm, run, metric, torch.arange(len(run)), {})
    latents, errors = {}, {}
    for name in run.latents:
        number, one, _ = run.site(name)
        base = _baseline(one, chosen.get(name))
        mine = {write: grads[number, write] for write in range(len(one.writes))}
        errors[name] = _error_scores(run, one, mine, run.errors[name])
        if not patching:
            latents[name] = _integrated(lm, run, metric, name, base, steps, groups, batch_size, seed)
            continue
        active = run.latents[name]
        indices = active.indices()
        scores = _slopes(run, number, mine, indices[0], indices) * (active.values() - base[indices[2]])
        latents[name] = torch.sparse_coo_tensor(
            indices, scores, active.shape, is_coalesced=True, check_invariants=False
        )
    return Scores(value, latents, errors)


def _gradients(
    lm: SplicedModel, run: Run, metric: MetricLike, texts: Tensor, additions: Mapping[tuple[int, int], Tensor]
) -> tuple[Float[Tensor, " batch"], dict[tuple[int, int], Float[Tensor, "batch context d"]]]:
    """Return the metric, and its gradient at every hook point that an SAE writes."""
    with torch.enable_grad():
        logits, splicer = lm.forward(run.tokens[texts], run.lengths[texts], leaves=True, additions=additions)
        assert splicer.leaves is not None
        values = evaluate_metric(metric, run, logits, texts)
        if not values.requires_grad:
            raise InterventionError(
                "the metric has no gradient: it must be computed from the logits by differentiable operations, without "
                "detach, argmax or NumPy"
            )
        keys = list(splicer.leaves)
        found = torch.autograd.grad(values.sum(), [splicer.leaves[key] for key in keys], allow_unused=True)
    zero = [torch.zeros_like(splicer.leaves[key]) for key in keys]
    return values.detach(), {
        key: zero if grad is None else grad for key, grad, zero in zip(keys, found, zero, strict=True)
    }


def _integrated(
    lm: SplicedModel,
    run: Run,
    metric: MetricLike,
    name: str,
    base: Float[Tensor, " d_sae"],
    steps: int,
    groups: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Return each active latent's activation beyond its baseline times the gradient averaged along its group's path."""
    number, one, _ = run.site(name)
    latents = run.latents[name]
    indices = latents.indices()
    beyond = latents.values() - base[indices[2]]
    row = indices[0] * groups + _drawn(len(beyond), groups, seed).to(indices.device)
    text = torch.arange(len(run)).repeat_interleave(groups)
    used = torch.unique(row)
    scores = torch.zeros_like(beyond)
    for kept, weight in zip(*_quadrature(steps), strict=True):
        for part in used.split(batch_size):
            mine = torch.isin(row, part)
            at = torch.searchsorted(part, row[mine])
            some = indices[:, mine]
            additions = written(run, number, one, at, some, (kept - 1) * beyond[mine], len(part))
            _, grads = _gradients(lm, run, metric, text[part.cpu()], additions)
            own = {write: grads[number, write] for write in range(len(one.writes))}
            scores[mine] += weight * _slopes(run, number, own, at, some)
    return torch.sparse_coo_tensor(indices, scores * beyond, latents.shape, is_coalesced=True, check_invariants=False)


def _drawn(n: int, groups: int, seed: int) -> Int64[Tensor, " n"]:
    """Return a group for each of n latents, at random and of sizes that differ by one at most."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % groups


def _quadrature(steps: int) -> tuple[list[float], list[float]]:
    """Return the points between 0 and 1 of Gauss-Legendre quadrature, and their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _baseline(one: Attached, given: Tensor | None) -> Float[Tensor, " d_sae"]:
    weights = next(one.sae.parameters())
    if given is None:
        return torch.zeros(one.sae.d_sae, dtype=weights.dtype, device=weights.device)
    if given.shape != (one.sae.d_sae,):
        raise InterventionError(
            f"the baseline at '{one.name}' has shape {list(given.shape)}; expected [{one.sae.d_sae}]"
        )
    return given.to(weights)


def _slopes(
    run: Run,
    number: int,
    grads: Mapping[int, Float[Tensor, "rows context d"]],
    row: Int64[Tensor, " n"],
    indices: Int64[Tensor, "3 n"],
) -> Float[Tensor, " n"]:
    """Return the gradient of each latent, from those in its row and at its token of what the SAE `number` writes."""
    one, scale = run.attached(number), run.scale(number)
    group, latent = indices[2] // one.groups[0].size, indices[2] % one.groups[0].size
    total = torch.zeros(indices.shape[1], dtype=next(one.sae.parameters()).dtype, device=indices.device)
    for which in range(len(one.groups)):
        mine = (group == which).nonzero()[:, 0]
        for write, grad in grads.items():
            decoder = one.decoder(which, write)
            if decoder is None:
                continue
            for part in mine.split(max(1, _ENTRIES // decoder.shape[1])):
                rows = grad[row[part].to(grad.device), indices[1, part].to(grad.device)].to(decoder)
                total[part] += (rows * decoder[latent[part]]).sum(dim=1)
    return total if scale is None else total * scale[indices[0], indices[1]]


def _error_scores(
    run: Run, one: Attached, grads: Mapping[int, Tensor], error: Float[Tensor, "batch context d_out"]
) -> Float[Tensor, "batch context"]:
    """Return the gradient times the error, summed over what the SAE writes."""
    total = error.new_zeros(run.tokens.shape)
    for write, part in enumerate(error.chunk(len(one.writes), dim=2)):
        total += (grads[write].to(part) * part).sum(dim=2)
    return total
