"""The configuration of `thresher explain`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ...shared.core.config import MAX_SEED, Cache, CacheBytes, Config, Device
from .llm.config import LlmConfig


class ExplainConfig(Config, frozen=True, kw_only=True):
    """Explain the latents of an evaluation's SAEs in words, and score the explanations on held-out documents."""

    evaluation: Annotated[str, Meta(description="Output folder of `thresher evaluate`, with its feature indexes.")]
    saes: Annotated[
        Annotated[list[str], Meta(min_length=1)] | None,
        Meta(description="Names of the SAEs to explain; by default every one that has a feature index."),
    ] = None
    latents: Annotated[
        Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)] | None,
        Meta(description="Latents to explain; by default a random choice of those that fire."),
    ] = None
    max_latents: Annotated[int, Meta(ge=1, description="Most latents to explain per SAE.")] = 2048
    explain_rows: Annotated[
        int, Meta(ge=1, description="Training rows that explanations are made from, spread evenly over the store.")
    ] = 262_144
    score_rows: Annotated[
        int, Meta(ge=1, description="Held-out rows that explanations are scored on, spread evenly over them.")
    ] = 131_072
    window: Annotated[int, Meta(ge=2, description="Tokens of a context that is shown or scored.")] = 32
    n_score: Annotated[
        int,
        Meta(ge=2, description="Held-out contexts to score each latent on: this many active, and as many inactive."),
    ] = 50
    n_quantiles: Annotated[
        int, Meta(ge=1, description="Quantiles of the activation from which equally many contexts are drawn.")
    ] = 10
    negatives: Annotated[
        Literal["random", "neighbours"],
        Meta(description="Inactive contexts: random ones, or those of neighbours, latents that often fire with it."),
    ] = "random"
    n_intruder_trials: Annotated[int, Meta(ge=0, description="Intruder trials per latent; 0 for none.")] = 10
    max_parts: Annotated[int, Meta(ge=1, description="Most parts of a rule, such as tokens.")] = 12
    causal: Annotated[
        bool,
        Meta(description="Steer latents in the model, and measure whether that makes their rules truer of its text."),
    ] = False
    causal_latents: Annotated[int, Meta(ge=1, description="Most latents per SAE to steer.")] = 50
    causal_prompts: Annotated[int, Meta(ge=2, description="Held-out texts that the model continues.")] = 32
    causal_tokens: Annotated[
        int, Meta(ge=1, description="Tokens to generate after each, as far as a context goes.")
    ] = 32
    causal_strength: Annotated[
        float, Meta(gt=0, description="What is added to the latent, in multiples of its largest activation.")
    ] = 1.0
    llm: Annotated[
        LlmConfig | None, Meta(description="A language model that explains and judges as well: a table, see below.")
    ] = None
    device: Device = "auto"
    cache: Cache = None
    cache_bytes: CacheBytes = None
    bootstrap_samples: Annotated[
        int, Meta(ge=0, description="Resamples of the documents for the confidence intervals; 0 for none.")
    ] = 1000
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="Seed of every random choice.")] = 0
