"""TopK: the k largest pre-activations of each row (arXiv 2406.04093)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from msgspec import Meta
from torch import Tensor

from ...shared.core.errors import ConfigError, SaeError
from ...shared.sae import Sae
from ..config import SaeConfig
from ..kernels.fused_state import TopKOptions
from ..kernels.gradient import Gradient
from ..stream.normalization import Normalization
from .base import Architecture, check_number_of_latents
from .contract import Batch, Number, Parameters, StepInput, StepOutput
from .parts.auxk import add_auxk
from .parts.decoder_norms import are_unit_norms
from .parts.dense import error_of, squared
from .parts.first_batch import first_encoder_scale
from .parts.latents import (
    SparseLatents,
    count,
    gradients_of,
    largest_of_rows,
    row_largest_of_all_ranks,
    scaled_gradients_of,
)
from .registry import register

_WIDER = 4
# A step is captured only if at least this many steps have the same k: a capture costs as much as dozens of steps.
_LEAST_STEPS_ALIKE = 256


class CountConfig(SaeConfig, frozen=True, kw_only=True):
    """Configuration of an architecture that is given the number of active latents."""

    k: Annotated[int, Meta(ge=1, description="Active latents per row.")]

    def __post_init__(self) -> None:
        """Check that there are k latents."""
        super().__post_init__()
        check_number_of_latents(self, "k", self.k)

    @property
    def name_ending(self) -> str:
        """The end of the default name."""
        return "-k{k}"


class LargestConfig(CountConfig, frozen=True, kw_only=True):
    """Configuration of an architecture that keeps the k largest latents."""

    aux_coefficient: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="Weight of the auxiliary loss of dead latents; 1/32 if not given."),
    ] = None
    k_aux: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Dead latents per row in the auxiliary loss; half the width of what is written if not given."),
    ] = None
    unit_norm_decoder: Annotated[
        bool | None,
        Meta(description="Hold decoder rows at unit norm, without the gradient along them."),
    ] = None


class CompetingConfig(LargestConfig, frozen=True, kw_only=True):
    """Configuration of an architecture that can choose latents among all layers of a cross-layer transcoder."""

    select_over: Annotated[
        Literal["all", "layer"] | None,
        Meta(
            description="Of a cross-layer transcoder: whether all layers' latents compete for k places, or each layer "
            "keeps k; all if not given."
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check that `select_over` applies, and that each layer has k latents if it keeps k."""
        super().__post_init__()
        if self.select_over is not None and not self.cross_layer:
            raise ConfigError("'select_over' is given, but only a table with cross_layer = true uses it; leave it out")
        if self.select_over == "layer" and self.k > self.d_sae:
            raise ConfigError(f"k is {self.k}, expected at most the d_sae = {self.d_sae} latents of a layer")


class TopKConfig(CompetingConfig, frozen=True, kw_only=True):
    """TopK: the k largest pre-activations of each row (arXiv 2406.04093)."""

    architecture: Literal["topk"] = "topk"
    k_anneal_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Steps over which k falls from d_in to k; it does not change if not given."),
    ] = None
    multi_topk_coefficient: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Weight of a second loss with 4 k latents, published as 0.125; none if not given."),
    ] = None


_L = TypeVar("_L", bound=LargestConfig)


class TopK(Architecture[_L]):
    """`f = ReLU(TopK(W_enc (x - b_dec) + b_enc))`, loss `||x - x_hat||^2 / Var(x)` and AuxK.

    The k latents of a row are chosen from a product in the compute dtype, and their values are then computed in the
    parameters' precision. If it is faster, both are done in the parameters' precision (see `largest_of_rows`).
    """

    saved_as = "topk"
    kind_of_wiring = None
    capturable = True
    shardable = True
    fusable = True
    resolved = (*Architecture.resolved, "aux_coefficient", "k_aux")

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm; it does by default."""
        return self.config.unit_norm_decoder is not False

    @property
    def aux_coefficient(self) -> float:
        """Return the weight of the loss that revives dead latents; 1/32 if not given (arXiv 2406.04093, A.2)."""
        return 1 / 32 if self.config.aux_coefficient is None else self.config.aux_coefficient

    @property
    def revives_dead(self) -> bool:
        """Whether there is an auxiliary loss."""
        return self.aux_coefficient > 0

    @property
    def k_aux(self) -> int:
        """Return how many dead latents of each row the auxiliary loss uses; d_out / 2 if not given."""
        return self.config.k_aux or max(1, self.d_out // 2)

    @property
    def first_k(self) -> int:
        """Return the number of active latents of the first step."""
        return int(self.config.k or 0)

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return the base's parameters, with the encoder at the scale that suits its first k latents."""
        parameters = super().initial_parameters(generator)
        if self.centred:
            parameters["W_enc"] *= first_encoder_scale(self.first_k, self.d_sae, self.d_in)
        return parameters

    def select(self, parameters: Parameters, batch: Batch, step: StepInput) -> SparseLatents:
        """Return the chosen entries, positive or not; where ranks share the latents, only the positive ones here."""
        k = int(self.config.k or 0)
        if self.latents_here is None:
            return largest_of_rows(step, parameters, batch, k, self.centred)
        return row_largest_of_all_ranks(step, parameters, batch, k, self.centred)

    @property
    def not_fused(self) -> str | None:
        """Why the fused kernels cannot take this step; they hold decoder rows at unit norm."""
        found = super().not_fused
        if found is None and not self.centred:
            found = "it writes another hook point than it reads"
        if found is None and not self.unit_norm_decoder:
            found = "unit_norm_decoder = false"
        if found is None and self.config.weight_decay:
            found = "weight_decay is given"
        if found is None and self.frozen:
            found = f"{' and '.join(sorted(self.frozen))} is frozen"
        return found

    def fused_options(self, total_variance: float, dead_after_tokens: int) -> TopKOptions | None:
        """Return the options of the fused step, or None if there is none."""
        if self.not_fused is not None:
            return None
        beta1, beta2 = self.adam_betas
        return TopKOptions(
            k=int(self.config.k or 0),
            total_variance=total_variance,
            beta1=beta1,
            beta2=beta2,
            eps=self.eps,
            decoder_lr_scale=self.lr_scales.get("W_dec", 1.0),
            max_norm=self.config.clip_grad_norm,
            aux_coefficient=self.aux_coefficient,
            k_aux=self.k_aux,
            dead_after_tokens=dead_after_tokens,
        )

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, latents = batch.x, self.select(parameters, batch, step)
        values = latents.pre_acts.relu()
        W_dec = parameters["W_dec"] if step.W_dec_compute is None else step.W_dec_compute
        decoded = step.across.over_latents(latents.decode(values, W_dec))
        error = error_of(decoded, parameters, batch)
        mse = squared(error) / len(x)
        scale = 2 / (len(x) * step.total_variance)
        by_pre_acts = torch.where(values > 0, latents.grad_values(error, parameters["W_dec"]).mul_(scale), 0)
        gradients = scaled_gradients_of(
            step, parameters, latents, batch, error, values, by_pre_acts, scale, self.centred
        )
        terms: dict[str, Number] = {"mse_loss": mse / step.total_variance}
        return self.finish(parameters, batch, step, latents, gradients, error, terms, mse)

    def finish(
        self,
        parameters: Parameters,
        batch: Batch,
        step: StepInput,
        latents: SparseLatents,
        gradients: Mapping[str, Gradient],
        error: Tensor,
        terms: dict[str, Number],
        mse: Number,
    ) -> StepOutput:
        """Add AuxK if latents are dead, and record which latents fired."""
        if step.dead is not None and self.aux_coefficient > 0:
            terms["auxk_loss"] = add_auxk(
                gradients,
                parameters,
                batch,
                step.W_enc_compute,
                error,
                step.dead,
                self.k_aux,
                self.aux_coefficient,
                step.kernels.topk_of_rows,
                self.centred,
                step.across,
                step.n_dead,
            )
        l0 = step.across.over_latents(count(latents.pre_acts > 0)) / len(batch.x)
        return StepOutput(gradients, latents.fired(), sum(terms.values()), mse, l0, terms)

    def held(self, sae: Sae, normalization: Normalization) -> dict[str, Tensor]:
        """Return an SAE's tensors in training's units and layout.

        Raises:
            SaeError: training would hold decoder norms at one, and that changes which latents are chosen.
        """
        norms = self.decoder_norms_of(sae, normalization)
        if self.saved_as == "topk" and self.unit_norm_decoder and not are_unit_norms(norms):
            raise SaeError(
                f"decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}, expected 1, and "
                "scaling them would change which latents are the top k; give unit_norm_decoder = false"
            )
        return super().held(sae, normalization)

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report another k."""
        found, theirs, k = super().differences(sae, normalization), sae.config.get("k"), self.config.k
        if isinstance(theirs, int) and theirs != k:
            found.append(f"it keeps k = {theirs} latents, this one {k}")
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe("k", aux_coefficient=self.aux_coefficient)


class AnnealedTopK(TopK[TopKConfig]):
    """TopK with k-annealing, linear from d_in to k, and Multi-TopK, which adds `c L(4 k)` to the loss `L(k)`."""

    capturable = True

    @property
    def needs_all_latents(self) -> str | None:
        """Ranks select the same k latents in every step, once."""
        return "its k or loss"

    @property
    def schedules(self) -> dict[str, tuple[int | None, str]]:
        """The number of steps over which k falls."""
        return {"k_anneal_steps": (self.config.k_anneal_steps, f"k would not reach {self.config.k}")}

    @property
    def note(self) -> str | None:
        """Metrics are computed with the annealed k."""
        annealed = self.config.k_anneal_steps is not None
        return "the metrics of {} are of the annealed k, which each line of metrics.jsonl gives" if annealed else None

    @property
    def first_k(self) -> int:
        """Return the number of active latents of the first step."""
        return self.k_at(0)

    def k_at(self, steps_done: int) -> int:
        """Return the number of active latents at a step; steps count from 0."""
        k, steps = int(self.config.k or 0), self.config.k_anneal_steps or 0
        start = min(self.d_in, self.d_sae)
        if steps_done >= steps or start <= k:
            return k
        return round(start + (k - start) * steps_done / steps)

    def decided_at(self, steps_done: int) -> Hashable | None:
        """Return the step's k, which determines its shapes, or None while k changes too often to capture steps."""
        k, steps = self.k_at(steps_done), self.config.k_anneal_steps or 0
        n_values = min(self.d_in, self.d_sae) - int(self.config.k or 0)
        return k if steps_done >= steps or steps >= _LEAST_STEPS_ALIKE * n_values else None

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report the k of the first step."""
        found, first, k = super().differences(sae, normalization), self.k_at(0), self.config.k
        return found + ([f"k_anneal_steps keeps {first} latents at first, and {k} at the end"] if first != k else [])

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        k, coefficient = self.k_at(step.steps_done), self.config.multi_topk_coefficient or 0.0
        latents, gradients, error = self._reconstruct(parameters, batch, step, k)
        mse = squared(error) / len(batch.x)
        terms: dict[str, Number] = {"mse_loss": mse / step.total_variance}
        if coefficient:
            _, wider, rest = self._reconstruct(parameters, batch, step, min(_WIDER * k, self.d_sae))
            for name, gradient in gradients.items():
                gradient.add_(wider[name], alpha=coefficient)
            terms["multi_topk_loss"] = coefficient * squared(rest) / (len(batch.x) * step.total_variance)
        output = self.finish(parameters, batch, step, latents, gradients, error, terms, mse)
        if self.config.k_anneal_steps:
            output.terms["k"] = float(k)
        return output

    def _reconstruct(
        self, parameters: Parameters, batch: Batch, step: StepInput, k: int
    ) -> tuple[SparseLatents, Parameters, Tensor]:
        """Return the k largest entries of each row, the gradients of their mean squared error, and the error."""
        x, latents = batch.x, largest_of_rows(step, parameters, batch, k, self.centred)
        values = latents.pre_acts.relu()
        error = error_of(latents.decode(values, parameters["W_dec"]), parameters, batch)
        g = error * (2 / (len(x) * step.total_variance))
        by_pre_acts = torch.where(values > 0, latents.grad_values(g, parameters["W_dec"]), 0)
        return latents, gradients_of(parameters, latents, x, g, values, by_pre_acts, self.centred), error


class RandomConfig(LargestConfig, frozen=True, kw_only=True):
    """Random directions: a TopK SAE of which only the biases are trained, as a baseline (arXiv 2602.14111)."""

    architecture: Literal["random"] = "random"
    unused = (*LargestConfig.unused, "aux_coefficient", "k_aux", "unit_norm_decoder", "decoder_lr_scale")


@register(RandomConfig)
class Random(TopK[RandomConfig]):
    """TopK whose encoder and decoder stay at their random initial directions; only its biases are trained."""

    capturable = True
    shardable = True
    resolved = Architecture.resolved
    initial_parameters = Architecture.initial_parameters

    @property
    def frozen(self) -> frozenset[str]:
        """Return the parameters that training leaves as they are: the directions, and what `freeze` names."""
        return super().frozen | {"W_enc", "W_dec"}

    @property
    def aux_coefficient(self) -> float:
        """Return 0: an auxiliary loss would have nothing to train."""
        return 0.0


@register(TopKConfig)
def make_topk(config: TopKConfig, d_in: int, d_out: int | None = None) -> TopK[TopKConfig]:
    """Return plain TopK, or with k-annealing or Multi-TopK."""
    plain = config.k_anneal_steps is None and config.multi_topk_coefficient is None
    return (TopK if plain else AnnealedTopK)(config, d_in, d_out)
