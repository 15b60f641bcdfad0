"""The endpoints that run the model: activations, contrasts, steering and its curve. Each is a job of the worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ....shared.core.errors import InterventionError, MissingFileError
from ..model.activations import contrast_texts, text_activations
from ..model.attribution import attribute_prompt
from ..model.circuits import trace_prompt
from ..model.steering import LatentEditRequest, SamplingRequest, steer_texts, strength_curve
from ..model.worker import Job
from .messages import (
    ActivationsRequest,
    AttributionRequest,
    ContrastRequest,
    CurveRequest,
    GraphRequest,
    SteerRequest,
    text_or_messages,
)
from .services import Services


def answer_activations(services: Services, request: ActivationsRequest) -> Job:
    """Run a text: the strongest latents of each token in every SAE, and where each SAE's strongest ones fire.

    A checkpoint of an SAE, by the name that `/api/saes` gives it, is another SAE with the same latents.
    """
    names = services.names(request.saes or list(request.latents) or None, checkpoints=True)
    for name, latents in request.latents.items():
        trained = services.shelf.checkpoints[name].sae if name in services.shelf.checkpoints else name
        for latent in latents:
            services.check_latent(trained, latent)
    text, messages = request.parts()
    return services.worker.submit(
        lambda lm, job: text_activations(lm, job, lm.tokens(text, messages), names, request.top, request.latents)
    )


def answer_contrast(services: Services, request: ContrastRequest) -> Job:
    """Find the latents that fire on some texts and not on others."""
    names = services.names(request.saes)

    def work(lm: Any, job: Job) -> dict[str, Any]:
        a, b = ([lm.tokens(*text_or_messages(prompt)) for prompt in side] for side in (request.a, request.b))
        return services.described(contrast_texts(lm, job, a, b, names, request.limit))

    return services.worker.submit(work)


def answer_steer(services: Services, request: SteerRequest) -> Job:
    """Continue a prompt with and without edits of latents, as server-sent events, one for each token."""
    _check_edits(services, request.edits)
    _check_sampling(services, request.sampling)
    prompt = text_or_messages(request.prompt)
    return services.worker.submit(
        lambda lm, job: steer_texts(lm, job, lm.tokens(*prompt), request.edits, request.sampling)
    )


def answer_curve(services: Services, request: CurveRequest) -> Job:
    """Measure effect and damage of one latent's edit at several strengths, as server-sent events."""
    _check_edits(services, [request.edit])
    _check_sampling(services, request.sampling)

    text, messages = text_or_messages(request.prompt)

    def work(lm: Any, job: Job) -> dict[str, Any]:
        tokens = lm.tokens(text, messages)
        return strength_curve(
            lm,
            job,
            text or "".join(lm.texts(tokens)),
            tokens,
            request.edit,
            request.strengths,
            request.concept,
            request.sampling,
            request.random_latents,
        )

    return services.worker.submit(work)


def answer_attribution(services: Services, request: AttributionRequest) -> Job:
    """Estimate what each latent adds to the likeliest next token of a prompt, through one SAE per hook point."""
    names = services.names(request.saes) if request.saes else services.one_per_hook_point()
    prompt = request.parts()

    def work(lm: Any, job: Job) -> dict[str, Any]:
        return services.described(attribute_prompt(lm, job, lm.tokens(*prompt), names))

    return services.worker.submit(work)


def answer_graph(services: Services, request: GraphRequest) -> Job:
    """Trace a prompt's next token through the run's transcoders: an attribution graph in the viewers' schema."""
    names = services.names(request.saes) if request.saes else services.run.transcoders
    if not names:
        raise InterventionError("this run has no transcoders; train some with configs/train/graph.toml (make graph)")
    (text, messages), model = request.parts(), services.run.model.name or "model"

    def work(lm: Any, job: Job) -> dict[str, Any]:
        tokens = lm.tokens(text, messages)
        found = trace_prompt(lm, job, text or "".join(lm.texts(tokens)), tokens, names, model)
        hook_points = {name: services.tables.index(name).metadata.get("hook_point") for name in names}
        return found | {"saes": hook_points}

    return services.worker.submit(work)


def _check_edits(services: Services, edits: Iterable[LatentEditRequest]) -> None:
    for edit in edits:
        services.check_latent(edit.sae, edit.latent)
        edit.edit()
        if edit.sae not in services.run.saes:
            raise MissingFileError(f"the weights of the SAE '{edit.sae}' are no longer where they were evaluated")


def _check_sampling(services: Services, sampling: SamplingRequest) -> None:
    config = services.config
    bounds: Sequence[tuple[str, float, float, float]] = (
        ("max_new_tokens", sampling.max_new_tokens, 1, config.max_new_tokens),
        ("n", sampling.n, 1, config.max_samples),
        ("temperature", sampling.temperature, 0, 10),
        ("top_p", sampling.top_p, 1e-6, 1),
        ("top_k", sampling.top_k, 0, 1_000_000),
        ("seed", sampling.seed, 0, 2**63 - 1),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise InterventionError(f"{name} is {value:g}; expected from {low:g} to {high:g}")
