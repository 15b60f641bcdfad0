"""Evaluate steering: how strength trades an effect against damage, beside random latents steered as strongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.core.errors import InterventionError
from ...shared.core.terminal.progress import progress
from ...shared.intervene.edits import Add, Clamp, Edit, Scale, Unit, Where
from ...shared.intervene.metrics import KLDivergence, LogProbability, evaluate_metric
from ...shared.intervene.sae_model import SaeModel
from ...shared.intervene.texts import one_token
from .statistics import mean_interval

Action = Literal["add", "clamp", "scale"]
Scorer = Callable[[list[str]], Sequence[float]]
_ACTIONS: dict[str, type[Add] | type[Clamp] | type[Scale]] = {"add": Add, "clamp": Clamp, "scale": Scale}


@dataclass(frozen=True)
class SteeringCurve:
    """The points of a curve, one row for each strength of the latent and of each random one, and the texts generated.

    A row has `latent`, `is_random`, `strength`, `effect` (the log-probability in nats that the next token after a
    prompt is one of the concept's), `kl` (KL(clean || steered) on the prompts, in nats per token), `perplexity` (of
    the generated texts under the clean model) and `score` (the scorer's mean), each None where it was not measured.
    """

    points: list[dict[str, Any]]
    texts: list[dict[str, Any]]


def steering_curve(
    lm: SaeModel,
    hook_point: str,
    latent: int,
    strengths: Sequence[float],
    prompts: Sequence[str],
    *,
    concept: Sequence[str | int] = (),
    scorer: Scorer | None = None,
    action: Action = "add",
    unit: Unit = "activation",
    where: Where = "all",
    max_new_tokens: int = 40,
    temperature: float = 0.8,
    n: int = 2,
    random_latents: int = 8,
    seed: int = 0,
) -> SteeringCurve:
    """Steer a latent at several strengths, and random latents that fire on the prompts or elsewhere just as strongly.

    Args:
        lm: the model with its SAEs; random latents and `unit="max"` need its `maxima`.
        hook_point: of the latent.
        latent: what to steer.
        strengths: of `action`, in units of the activation or of each latent's maximum.
        prompts: texts to continue.
        concept: tokens whose log-probability is the effect.
        scorer: a function of the generated texts that returns a score for each.
        action: "add", "clamp" or "scale".
        unit: "activation" or "max".
        where: at which tokens, as in `Edit`.
        max_new_tokens: length of each continuation.
        temperature: of sampling.
        n: continuations of each prompt.
        random_latents: of the baseline.
        seed: of sampling, and of the random latents.

    Raises:
        InterventionError: there are no prompts, strengths or an unknown action, or too few latents fire.
        HookPointError: there is no such SAE or latent.
    """
    if action not in _ACTIONS or not prompts or not strengths:
        raise InterventionError(
            f"action is '{action}' with {len(prompts)} prompts and {len(strengths)} strengths; expected add, clamp or "
            "scale, and at least one of each"
        )
    ids = [one_token(token, lm.tokenizer) for token in concept]
    chosen = [latent, *_random(lm, hook_point, latent, random_latents, seed)]
    clean = lm.run(prompts)
    points, texts = [], []
    with progress(total=len(chosen) * len(strengths), desc="steer", unit="point") as bar:
        for which in chosen:
            for strength in strengths:
                edit: Edit = _ACTIONS[action](strength, where=where, unit=unit)
                point: dict[str, Any] = {"latent": which, "is_random": which != latent, "strength": float(strength)}
                with lm.steer({(hook_point, which): edit}):
                    steered = lm.run(prompts)
                    tokens = lm.generate_tokens(prompts, max_new_tokens, temperature=temperature, n=n, seed=seed)
                everyone = torch.arange(len(prompts))
                point["kl"] = float(evaluate_metric(KLDivergence(), clean, steered.logits, everyone).mean())
                point["effect"] = _effect(steered.logits, steered.lengths, ids)
                point["perplexity"] = _perplexity(lm, prompts, tokens, n)
                written = [lm.tokenizer.decode(some) if lm.tokenizer else "" for some in tokens]
                point["score"] = float(np.mean(list(scorer([str(text) for text in written])))) if scorer else None
                points.append(point)
                if which == latent:
                    for number, text in enumerate(written):
                        texts.append({"strength": float(strength), "prompt": prompts[number // n], "text": str(text)})
                bar.update()
    return SteeringCurve(points, texts)


def strongest_latent(lm: SaeModel, hook_point: str, prompts: Sequence[str], concept: Sequence[str | int]) -> int:
    """Return the latent that adds most to the log-probability of the concept after the prompts.

    Its score is that of integrated gradients, summed over the prompts and their tokens.

    Raises:
        InterventionError: no latent adds to it.
    """
    name = lm.at(hook_point).name
    ids = [one_token(token, lm.tokenizer) for token in concept]
    scores = torch.stack(
        [
            lm.attribute(lm.run(prompt), lambda logits: _log_probability(logits[:, -1], ids), "integrated_gradients")
            .by_latent()[name][0]
            .cpu()
            for prompt in prompts
        ]
    ).sum(dim=0)
    if not float(scores.max()) > 0:
        raise InterventionError(f"no latent at '{name}' adds to the concept after the prompts; give a latent's number")
    return int(scores.argmax())


def baseline_of(curve: SteeringCurve, key: str) -> list[dict[str, Any]]:
    """Return the mean of a quantity over the random latents at each strength, with its 95% interval."""
    rows = []
    for strength in dict.fromkeys(point["strength"] for point in curve.points):
        same = [point for point in curve.points if point["strength"] == strength and point["is_random"]]
        values = np.array([point[key] for point in same if point[key] is not None], dtype=float)
        if len(values):
            rows.append({"strength": strength, "mean": float(values.mean()), "interval": mean_interval(values)})
    return rows


def _random(lm: SaeModel, hook_point: str, latent: int, n: int, seed: int) -> list[int]:
    """Return other latents that fire, at random."""
    name = lm.at(hook_point).name
    if not n:
        return []
    if name not in lm.maxima:
        raise InterventionError("random latents are drawn from those that fire; call measure_maxima(texts) first")
    alive = [number for number in (lm.maxima[name] > 0).nonzero()[:, 0].tolist() if number != latent]
    if len(alive) < n:
        raise InterventionError(f"only {len(alive)} other latents fire; expected at least the {n} random ones")
    return sorted(np.random.default_rng(seed).choice(alive, size=n, replace=False).tolist())


def _effect(logits: Tensor, lengths: Tensor, concept: Sequence[int]) -> float | None:
    """Return the mean log-probability that the token after each prompt is one of the concept's."""
    if not concept:
        return None
    last = logits[torch.arange(len(logits)), (lengths - 1).to(logits.device)]
    return float(_log_probability(last, concept).mean())


def _log_probability(logits: Float[Tensor, "batch vocabulary"], concept: Sequence[int]) -> Float[Tensor, " batch"]:
    """Return the log-probability that the next token is one of the concept's."""
    return logits.float().log_softmax(dim=-1)[:, list(concept)].logsumexp(dim=-1)


def _perplexity(lm: SaeModel, prompts: Sequence[str], tokens: list[list[int]], n: int) -> float | None:
    """Return the clean model's perplexity of what was generated, over all its tokens; None if that is nothing."""
    starts = [ids for ids in lm.tokens(list(prompts)) for _ in range(n)]
    some = [(start, new) for start, new in zip(starts, tokens, strict=True) if new]
    if not some:
        return None
    run = lm.run([start for start, _ in some], continuation=[new for _, new in some])
    total = float(evaluate_metric(LogProbability(), run, run.logits, torch.arange(len(some))).sum())
    return float(np.exp(-total / sum(len(new) for _, new in some)))
