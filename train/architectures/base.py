"""The base of architectures: initial weights, a loss with its gradients, and export to and import from an `Sae`.

Inputs are centred on the store's mean and scaled. `b_dec` therefore starts at zero, which is the mean of the
activations, and bfloat16 spends its precision on what varies. While training, `W_enc` is `[d_sae, d_in]`, one row per
latent as in `W_dec`, which is the layout of the sparse operations.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor

from ...shared.core.errors import ConfigError
from ...shared.sae import Sae
from ..config import SaeConfig
from ..stream.normalization import Normalization
from .contract import Batch, Buffers, Parameters, StepInput, StepOutput
from .parts.decoder_norms import fold_decoder_norms, has_unit_norms

C = TypeVar("C", bound=SaeConfig)
P = TypeVar("P", bound="PenaltyConfig")


class Architecture(Generic[C]):
    """Base of the architectures: `config` holds the keys of its `[[sae]]` table.

    A subclass states in `saved_as` which kind of SAE `exported` gives, and in `resolved` its properties that depend on
    what the configuration leaves open.

    Set `capturable = True` (it is not inherited) only if a step with `room` never synchronises with the device and
    always launches the same kernels, except where `decided_at` changes.
    """

    saved_as: ClassVar[str]
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 6.25e-10
    default_lr: ClassVar[float | None] = None
    kind_of_wiring: ClassVar[str] = "sae"
    capturable: ClassVar[bool] = False
    resolved: ClassVar[tuple[str, ...]] = ("lr", "adam_betas", "eps", "lr_scales", "unit_norm_decoder")

    def __init__(self, config: C, d_in: int, d_out: int | None = None):
        self.config = config
        self.d_in, self.d_out = d_in, d_out or d_in
        self.d_sae = config.d_sae

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm."""
        return True

    @property
    def revives_dead(self) -> bool:
        """Whether the loss depends on which latents are dead; if not, `dead` of a step is None."""
        return False

    @property
    def schedules(self) -> dict[str, tuple[int | None, str]]:
        """Keys with a number of steps that the run must have: their values, and what fails in a shorter run."""
        return {}

    @property
    def note(self) -> str | None:
        """A sentence for the plan about the meaning of the metrics, with `{}` in place of the SAEs' names."""
        return None

    def sparsity_warmup_steps(self, n_steps: int) -> int:
        """Return the number of steps over which a step's `sparsity_scale` grows from 0 to 1 in a run of `n_steps`."""
        return 0

    @property
    def lr(self) -> float:
        """Return the peak learning rate; 2e-4 / sqrt(d_sae / 2^14) if none is published (arXiv 2406.04093, A.3)."""
        return self.config.lr or self.default_lr or 2e-4 / (self.d_sae / 2**14) ** 0.5

    @property
    def adam_betas(self) -> tuple[float, float]:
        """Return Adam's decay rates."""
        given = self.config.beta1, self.config.beta2
        beta1, beta2 = (own if beta is None else beta for beta, own in zip(given, self.betas, strict=True))
        return beta1, beta2

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the effective values of the properties in `resolved`, which have defaults.

        A run that resumes compares them, because another release may have other defaults.
        """
        return {name: getattr(self, name) for name in self.resolved}

    @property
    def lr_scales(self) -> dict[str, float]:
        """Return the factors of the learning rate that are not 1, by parameter."""
        return {}

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return random decoder directions of unit norm, the encoder their transpose, and zero biases."""
        W_dec = torch.randn(self.d_sae, self.d_in, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        return {
            "W_enc": W_dec.clone(),
            "b_enc": torch.zeros(self.d_sae),
            "W_dec": W_dec,
            "b_dec": torch.zeros(self.d_in),
        }

    def initial_buffers(self) -> Buffers:
        """Return the state of training besides parameters, such as running means."""
        return {}

    def decided_at(self, steps_done: int) -> Hashable | None:
        """Return what the host decides about a step; a captured step is replayed only if this is the same.

        Return None while it changes too often for captures to pay off.
        """
        return ()

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Adapt random initial parameters to the first batch, in place; by default, do nothing."""

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients at these parameters."""
        raise NotImplementedError

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return the saved SAE's tensors, in raw activation units.

        Latents scale with the input, so the encoder's weights stay, its bias is divided by the
        scale, and the decoder keeps its norms.
        """
        return {
            "W_enc": parameters["W_enc"].T,
            "b_enc": parameters["b_enc"] / normalization.scale,
            "W_dec": parameters["W_dec"],
            "b_dec": parameters["b_dec"] / normalization.scale + normalization.mean.to(parameters["b_dec"].dtype),
        }

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters and buffers with which training starts from an SAE: the inverse of `exported`.

        The SAE is of the kind `saved_as` and of this architecture's sizes. Latents and reconstructions stay, except for
        what `differences` says.

        Raises:
            SaeError: the architecture cannot hold what the SAE computes.
        """
        tensors, scale = self._held(sae), normalization.scale
        W_enc = tensors["W_enc"].T.contiguous()
        parameters = {
            "W_enc": W_enc,
            "b_enc": bias_of_centred(sae, tensors["b_enc"], W_enc) * scale,
            "W_dec": tensors["W_dec"],
            "b_dec": (tensors["b_dec"] - normalization.mean) * scale,
        }
        return parameters, self.initial_buffers()

    def _held(self, sae: Sae) -> dict[str, Tensor]:
        """Return an SAE's tensors, with decoder norms folded into the encoder where training holds them at one."""
        tensors = {name: tensor.detach() for name, tensor in sae.named_parameters()}
        folds = self.unit_norm_decoder and not has_unit_norms(sae.W_dec)
        return fold_decoder_norms(tensors) if folds else tensors

    def check_source(self, sae: Sae) -> None:
        """Raise `SaeError` if training cannot start from an SAE of the right kind and sizes."""

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Return how the first step differs from what an SAE computes or is used for, each as a line for the user."""
        config = self.config
        found = [
            f"it is of a model loaded with {name} = true, this one of the model as it is"
            for name in sae.model_processing
        ]
        if sae.hook_point and sae.hook_point != config.hook_point:
            found.append(f"it is of '{sae.hook_point}', this one of '{config.hook_point}'")
        norms = sae.W_dec.detach().norm(dim=1)
        if self.unit_norm_decoder and not has_unit_norms(sae.W_dec):
            found.append(
                f"its decoder norms, {float(norms.min()):.3g} to {float(norms.max()):.3g}, move into the encoder: "
                "latents are scaled by them, and reconstructions stay"
            )
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe()

    def _describe(self, *keys: str, **resolved: Any) -> dict[str, Any]:
        """Return the shared hyperparameters, those of `keys` that are given, and `resolved` values."""
        values = {key: getattr(self.config, key) for key in ("architecture", "d_sae", *keys, "seed")}
        return {key: value for key, value in values.items() if value is not None} | resolved | {"lr": self.lr}

    def to_sae(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization, metadata: dict[str, Any]
    ) -> Sae:
        """Return the SAE for inference on raw activations."""
        tensors = self.exported(parameters, buffers, normalization)
        return Sae(
            self.saved_as,
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
            hook_point=self.config.hook_point,
            config=self.hyperparameters(),
            metadata=metadata,
        )


def bias_of_centred(sae: Sae, bias: Tensor, W_enc: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Return an SAE's encoder bias for inputs less `b_dec`, which not every SAE subtracts."""
    return bias if sae.apply_b_dec_to_input else bias + W_enc @ sae.b_dec.detach()


def unused_start(**given: float | None) -> list[str]:
    """Return a line for each key that is given and that says where training starts, where an SAE says it instead."""
    return [
        f"{key} = {value:g} is not used: thresholds and biases start at the SAE's"
        for key, value in given.items()
        if value is not None
    ]


class PenaltyConfig(SaeConfig, frozen=True, kw_only=True):
    """Configuration of an architecture that penalises active latents."""

    sparsity_warmup_steps: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="Steps over which the sparsity penalty grows; if not given, a twentieth of the run, or all of "
            "it with tanh."
        ),
    ] = None


class PenaltyArchitecture(Architecture[P]):
    """Base of the architectures with a sparsity penalty, which is multiplied by a step's `sparsity_scale`."""

    sparsity_warmup_fraction: ClassVar[float] = 1 / 20
    resolved = (*Architecture.resolved, "sparsity_warmup_fraction")

    def sparsity_warmup_steps(self, n_steps: int) -> int:
        """Return the number of steps over which the penalty grows to its full weight."""
        given = self.config.sparsity_warmup_steps
        return int(n_steps * self.sparsity_warmup_fraction) if given is None else given

    @property
    def schedules(self) -> dict[str, tuple[int | None, str]]:
        """The penalty's growth."""
        return {
            "sparsity_warmup_steps": (
                self.config.sparsity_warmup_steps,
                "the sparsity penalty would not reach its weight",
            )
        }


def check_number_of_latents(config: SaeConfig, key: str, given: float | None) -> None:
    """Raise `ConfigError` if a key asks for more active latents than there are."""
    if given is None or given <= config.n_latents:
        return
    limit = f"the {config.n_latents} latents of all layers" if config.cross_layer else f"d_sae = {config.d_sae}"
    raise ConfigError(f"{key} is {given:g}, expected at most {limit}; give a smaller {key}")
