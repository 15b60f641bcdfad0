"""The `[llm]` table of `thresher explain`: which language model explains and judges, and what it may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from ....shared.core.config import Config
from ....shared.core.errors import ConfigError

Judged = Literal["llm", "rules", "token frequency", "random latent"]
Score = Literal["detection", "fuzzing", "simulation", "intruder"]
_Positive = Annotated[int, Meta(ge=1)]
Price = Annotated[float, Meta(ge=0)]


class LlmConfig(Config, frozen=True, kw_only=True):
    """A language model behind an OpenAI-compatible endpoint, what it is asked, and its limits."""

    base_url: Annotated[str, Meta(description="URL of the API, such as http://127.0.0.1:8000/v1.")]
    model: Annotated[str, Meta(description="Name of the model, as the server knows it.")]
    api_key_env: Annotated[
        str | None, Meta(description="Environment variable that holds the API key; none for servers without keys.")
    ] = None
    max_latents: Annotated[_Positive, Meta(description="Most latents per SAE that the model is asked about.")] = 100
    scores: Annotated[
        list[Score],
        Meta(description="What the model judges: detection, fuzzing, simulation, intruder; [] for explanations alone."),
    ] = field(default_factory=lambda: ["detection", "fuzzing", "intruder"])
    judged: Annotated[
        list[Judged], Meta(min_length=1, description="Explanations to judge: llm, rules, and the two baselines.")
    ] = field(default_factory=lambda: ["llm", "token frequency", "random latent"])
    n_explain: Annotated[_Positive, Meta(description="Training contexts that an explanation is made from.")] = 40
    contexts_per_call: Annotated[_Positive, Meta(description="Contexts that detection and fuzzing show per call.")] = 10
    n_simulated: Annotated[int, Meta(ge=2, description="Contexts per latent to simulate, half of them active.")] = 10
    temperature: Annotated[float, Meta(ge=0, description="Temperature of sampling; 0 takes the likeliest.")] = 0.0
    max_explanation_tokens: Annotated[_Positive, Meta(description="Most tokens of an explanation.")] = 200
    max_judgement_tokens: Annotated[_Positive, Meta(description="Most tokens of a judgement.")] = 400
    concurrency: Annotated[_Positive, Meta(description="Requests in flight at once.")] = 8
    requests_per_minute: Annotated[_Positive | None, Meta(description="Most requests per minute.")] = None
    tokens_per_minute: Annotated[_Positive | None, Meta(description="Most tokens per minute.")] = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds to wait for an answer.")] = 120.0
    retries: Annotated[int, Meta(ge=0, description="Further tries of a request that fails or gets no answer.")] = 6
    backoff: Annotated[
        float, Meta(gt=0, description="Seconds before the first retry; doubled each time, up to a minute.")
    ] = 1.0
    input_price: Annotated[Price | None, Meta(description="Price of a million prompt tokens.")] = None
    output_price: Annotated[Price | None, Meta(description="Price of a million tokens of answers.")] = None
    max_tokens: Annotated[_Positive | None, Meta(description="Hard budget of tokens, of prompts and answers.")] = None
    max_cost: Annotated[Price | None, Meta(description="Hard budget, in the unit of the prices.")] = None
    estimate_only: Annotated[bool, Meta(description="Print what the requests would take, and send none.")] = False

    def __post_init__(self) -> None:
        """Check that a budget in money has prices."""
        super().__post_init__()
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ConfigError("max_cost needs input_price and output_price, the prices of a million tokens")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url: expected a URL such as http://127.0.0.1:8000/v1, got '{self.base_url}'")


CHANGES_NO_ANSWER = (
    *("api_key_env", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "retries", "backoff"),
    *("input_price", "output_price", "max_tokens", "max_cost", "estimate_only"),
)
"""Settings that change no answer."""
