"""Generate with and without edits of latents, token by token, and measure what the edits change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from ....shared.core.errors import InterventionError
from ....shared.intervene.edits import Ablate, Add, Clamp, Edit, Scale
from ....shared.intervene.generation import end_tokens
from ....shared.intervene.sae_model import SaeModel
from ...causal.steering_curve import Action, steering_curve
from ...report.definitions import significant
from .loaded import LoadedModel
from .worker import Job

N_NEXT = 10


class LatentEditRequest(msgspec.Struct, forbid_unknown_fields=True):
    """An edit of one latent: `strength` is the amount added, the value set, or the factor, in units of `unit`."""

    sae: str
    latent: int
    action: Literal["add", "clamp", "scale", "ablate"] = "add"
    strength: float = 1.0
    unit: Literal["activation", "max"] = "activation"
    where: Literal["all", "prompt", "generated", "active"] | list[int] = "all"

    def edit(self) -> Edit:
        """Return the edit."""
        if not abs(self.strength) < 1e6:
            raise InterventionError(f"strength is {self.strength:g}; expected less than a million")
        if self.action == "ablate":
            return Ablate(where=self.where)
        if self.action == "scale":
            return Scale(self.strength, where=self.where)
        kind = Add if self.action == "add" else Clamp
        return kind(self.strength, where=self.where, unit=self.unit)


class SamplingRequest(msgspec.Struct, forbid_unknown_fields=True):
    """How to continue a prompt."""

    max_new_tokens: int = 40
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0


def edits_by_target(requests: Sequence[LatentEditRequest], keys: Mapping[str, str]) -> dict[Any, Edit]:
    """Return the edits as `SaeModel.steer` takes them; of two edits of one latent the later one counts."""
    return {(keys[request.sae], request.latent): request.edit() for request in requests}


def steer_texts(
    lm: LoadedModel, job: Job, tokens: Sequence[int], requests: Sequence[LatentEditRequest], sampling: SamplingRequest
) -> dict[str, Any]:
    """Say the next tokens' probabilities with and without the edits, then stream continuations of both kinds.

    Events: `start` with the prompt's tokens; `next` with both distributions and KL(clean || steered) in nats; `token`
    with the text that a continuation grows by; and the result, which has the whole texts.
    """
    spliced, keys = lm.with_saes([request.sae for request in requests])
    edits = edits_by_target(requests, keys)
    prompt = [list(tokens)]
    job.say("start", tokens=lm.texts(tokens))
    clean = spliced.run(prompt)
    with spliced.steer(edits):
        steered = spliced.run(prompt)
    log_p, log_q = (logits[0, -1].float().log_softmax(dim=-1) for logits in (clean.logits, steered.logits))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    job.say("next", kl=significant(float(kl), 4), **_next_tokens(lm, clean.logits[0, -1], steered.logits[0, -1]))
    del clean, steered
    found: dict[str, Any] = {}
    for kind in ("clean", "steered"):
        with spliced.steer(edits if kind == "steered" else {}):
            found[kind] = _stream(lm, spliced, job, kind, prompt, sampling)
    return found


def _next_tokens(lm: LoadedModel, clean: Tensor, steered: Tensor) -> dict[str, Any]:
    """Return the likeliest next tokens of both kinds with both probabilities, and those that change most."""
    before, after = clean.float().softmax(-1).cpu(), steered.float().softmax(-1).cpu()
    shown = [before.topk(N_NEXT).indices, after.topk(N_NEXT).indices, (after - before).abs().topk(N_NEXT).indices]
    ids = list(dict.fromkeys(torch.cat(shown).tolist()))
    rows = [
        {
            "token": token,
            "text": text,
            "clean": significant(float(before[token]), 4),
            "steered": significant(float(after[token]), 4),
        }
        for token, text in zip(ids, lm.alone(ids), strict=True)
    ]
    rows.sort(key=lambda row: -max(row["clean"], row["steered"]))
    return {"tokens": rows}


def _stream(
    lm: LoadedModel, spliced: SaeModel, job: Job, kind: str, prompt: list[list[int]], sampling: SamplingRequest
) -> list[str]:
    """Generate and say each continuation's text as it grows; return the texts."""
    ends = set(end_tokens(spliced))
    so_far: list[list[int]] = [[] for _ in range(sampling.n)]
    said = [""] * sampling.n
    ended = [False] * sampling.n

    def on_tokens(tokens: list[int]) -> None:
        job.check()
        for sample, token in enumerate(tokens):
            ended[sample] = ended[sample] or token in ends
            if ended[sample]:
                continue
            so_far[sample].append(token)
            text = str(lm.tokenizer.decode(so_far[sample], skip_special_tokens=True))
            if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(said[sample]):
                continue  # part of a character: it comes with the token that completes it
            job.say("token", kind=kind, sample=sample, text=text[len(said[sample]) :])
            said[sample] = text

    lists = spliced.generate_tokens(
        prompt,
        sampling.max_new_tokens,
        on_tokens=on_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        n=sampling.n,
        seed=sampling.seed,
    )
    return [str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in lists]


def strength_curve(
    lm: LoadedModel,
    job: Job,
    prompt: str,
    tokens: Sequence[int],
    request: LatentEditRequest,
    strengths: Sequence[float],
    concept: Sequence[str],
    sampling: SamplingRequest,
    random_latents: int,
) -> dict[str, Any]:
    """Return effect and damage at several strengths of one latent, beside random latents steered as strongly."""
    if request.action == "ablate":
        raise InterventionError("a curve needs strengths; choose add, clamp or scale")
    spliced, keys = lm.with_saes([request.sae])
    action: Action = request.action
    points, texts = [], []
    as_tokens: Any = [list(tokens)]
    for strength in strengths:
        job.check()
        curve = steering_curve(
            spliced,
            keys[request.sae],
            request.latent,
            [strength],
            as_tokens,
            concept=concept,
            action=action,
            unit=request.unit,
            where=request.where,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            n=sampling.n,
            random_latents=random_latents,
            seed=sampling.seed,
        )
        written = [row | {"prompt": prompt} for row in curve.texts]
        points += curve.points
        texts += written
        job.say("points", points=curve.points, texts=written)
    return {"points": points, "texts": texts}
