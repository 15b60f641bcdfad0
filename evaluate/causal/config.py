"""Settings of `thresher steer`, `thresher attribute` and `thresher contrast`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from ...shared.core.config import MAX_SEED, Config, Device
from ...shared.core.errors import ConfigError

TextsSetting = Annotated[
    str | Annotated[list[str], Meta(min_length=1)],
    Meta(description="A text, a list of texts, or the path of a .txt file with one text on each line."),
]
_Positive = Annotated[int, Meta(ge=1)]


class CausalConfig(Config, frozen=True, kw_only=True):
    """What the three commands share: the model with its SAEs, and where results go."""

    model: Annotated[str, Meta(description="Folder or Hugging Face id of the model.")]
    saes: Annotated[
        str | Annotated[list[str], Meta(min_length=1)],
        Meta(description="Folder of an SAE, or a list: each is put at the hook point that it was trained at."),
    ]
    output: Annotated[str, Meta(description="Folder for the results and the page.")]
    error: Annotated[
        Literal["keep", "drop"],
        Meta(description="keep adds what an edit changes; drop puts reconstructions in place of activations."),
    ] = "keep"
    model_dtype: Annotated[str, Meta(description="float32, bfloat16, float16 or auto.")] = "float32"
    device: Device = "auto"
    trust_remote_code: Annotated[bool, Meta(description="Run code that comes with the model.")] = False
    batch_size: Annotated[_Positive, Meta(description="Texts, or ablations, that run at once.")] = 32


class SteerConfig(CausalConfig, frozen=True, kw_only=True):
    """A latent, the strengths to steer it at, and how to judge them."""

    prompts: TextsSetting
    latent: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Number of the latent to steer (default: the one that adds most to the concept)."),
    ] = None
    hook_point: Annotated[str | None, Meta(description="Hook point of the latent (default: the only SAE's).")] = None
    action: Annotated[Literal["add", "clamp", "scale"], Meta(description="What a strength does to the latent.")] = "add"
    strengths: Annotated[list[float], Meta(min_length=1, description="Strengths to compare.")] = field(
        default_factory=lambda: [0.0, 1.0, 2.0, 4.0]
    )
    unit: Annotated[
        Literal["activation", "max"],
        Meta(description="Unit of the strengths: activations, or multiples of each latent's maximum on maxima_texts."),
    ] = "max"
    maxima_texts: Annotated[
        TextsSetting | None, Meta(description="Texts that latents' maxima are measured on (default: the prompts).")
    ] = None
    where: Annotated[
        Literal["all", "prompt", "generated", "active"], Meta(description="The tokens at which the latent is edited.")
    ] = "all"
    concept: Annotated[
        list[str], Meta(description="Tokens whose log-probability after the prompts is the effect, of one token each.")
    ] = []
    max_new_tokens: Annotated[_Positive, Meta(description="Length of each continuation.")] = 40
    temperature: Annotated[float, Meta(ge=0, description="Temperature of sampling; 0 takes the likeliest.")] = 0.8
    n: Annotated[_Positive, Meta(description="Continuations of each prompt.")] = 2
    random_latents: Annotated[int, Meta(ge=0, description="Random latents steered for comparison.")] = 8
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="Seed of sampling and of the random latents.")] = 0
    lm_eval: Annotated[
        bool,
        Meta(description="Write strength-S.pt as well, for lm-evaluation-harness's model `steered` (add, all)."),
    ] = False

    def __post_init__(self) -> None:
        """Check that there is a latent, and that lm-evaluation-harness can do what its files are asked to do."""
        super().__post_init__()
        if self.latent is None and not self.concept:
            raise ConfigError("there is neither latent nor concept; give a latent's number, or tokens to find one by")
        if self.lm_eval and (self.action != "add" or self.where != "all"):
            raise ConfigError(
                f"lm_eval is true with action '{self.action}' and where '{self.where}'; lm-evaluation-harness steers "
                "with action add and where all"
            )


class AttributeConfig(CausalConfig, frozen=True, kw_only=True):
    """A text, the metric of its next token, and how latents are scored."""

    text: Annotated[str, Meta(min_length=1, description="Text whose next token is explained.")]
    right: Annotated[str | None, Meta(description="Token whose logit is explained (default: the likeliest).")] = None
    wrong: Annotated[
        str | None, Meta(description="Token whose logit is subtracted (default: the likeliest other one).")
    ] = None
    method: Annotated[
        Literal["attribution_patching", "integrated_gradients"], Meta(description="How latents are scored.")
    ] = "integrated_gradients"
    steps: Annotated[_Positive, Meta(description="Points of each path of integrated gradients.")] = 2
    groups: Annotated[_Positive, Meta(description="Paths of integrated gradients; 1 moves all latents at once.")] = 32
    verify: Annotated[int, Meta(ge=0, description="Latents of largest score to ablate as well, each at its token.")] = (
        32
    )
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="Seed of the random groups.")] = 0


class ContrastConfig(CausalConfig, frozen=True, kw_only=True):
    """Two sets of texts, and how the latents that tell them apart are found and confirmed."""

    a: TextsSetting
    b: TextsSetting
    pool: Annotated[
        Literal["mean", "max", "last"], Meta(description="How a latent's activations in a text become one number.")
    ] = "mean"
    top: Annotated[_Positive, Meta(description="Latents to list and to ablate.")] = 20
    right: Annotated[
        str | None,
        Meta(description="Token whose logit is measured (default: the texts' log-probability is)."),
    ] = None
    wrong: Annotated[str | None, Meta(description="Token whose logit is subtracted; required with right.")] = None

    def __post_init__(self) -> None:
        """Check that both tokens of the metric are given, or none."""
        super().__post_init__()
        if (self.right is None) != (self.wrong is None):
            raise ConfigError("right and wrong are the two tokens of one metric; give both or none")
