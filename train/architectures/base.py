"""What a trained architecture is: initial weights, a loss with its gradients, and an `Sae` to save.

Inputs are centred on the store's mean and scaled, so `b_dec` starts at zero, which is the mean of the
activations, and bfloat16 has its precision where the activations vary. While training, `W_enc` is
`[d_sae, d_in]`, a row per latent like `W_dec`: the layout of the sparse operations.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...shared.core.errors import ConfigError
from ...shared.sae import Sae
from ..config import SaeConfig
from ..stream.normalization import Normalization
from .contract import Batch, Buffers, Parameters, StepInput, StepOutput

COMMON_OPTIONS = (
    "hook_point",
    "hook_points",
    "reads",
    "writes",
    "skip",
    "d_sae",
    "architecture",
    "name",
    "lr",
    "beta1",
    "beta2",
    "weight_decay",
    "lr_decay",
    "decay_fraction",
    "seed",
    "init_from",
    "dead_after_tokens",
    "clip_grad_norm",
    "resample_every_tokens",
    "ema_decay",
)
"""Keys of a `[[sae]]` table that every architecture uses."""


class Architecture:
    """Base of the architectures; a subclass is registered by its `name`.

    `required` and `options` name the keys of a `[[sae]]` table that it uses besides `COMMON_OPTIONS`.

    One whose loss does not depend on which latents are dead says so in `revives_dead`, and is not told. One that says
    `capturable` of itself, which its subclasses do not inherit, asks the device for nothing in a step that has room,
    nor does anything there that the next step may do otherwise, but for what `decided_at` says.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    unit_norm_decoder: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 6.25e-10
    default_lr: ClassVar[float | None] = None
    kind_of_wiring: ClassVar[str] = "sae"
    revives_dead: ClassVar[bool] = True
    capturable: ClassVar[bool] = False
    sparsity_warmup_fraction: ClassVar[float] = 1 / 20
    resolved: ClassVar[tuple[str, ...]] = ("lr", "adam_betas", "eps", "lr_scales", "sparsity_warmup_fraction")

    def __init__(self, config: SaeConfig, d_in: int):
        for key in self.required:
            if getattr(config, key) is None:
                raise ConfigError(f"architecture '{self.name}' needs '{key}'; give it in the [[sae]] table")
        if config.k is not None and config.k > config.d_sae:
            raise ConfigError(f"k is {config.k}, expected at most d_sae = {config.d_sae}; give a smaller k")
        for key in ("target_l0", "initial_l0"):
            l0 = getattr(config, key)
            if l0 is not None and l0 > config.d_sae:
                raise ConfigError(f"{key} is {l0:g}, expected at most d_sae = {config.d_sae}; give a smaller {key}")
        self.config = config
        self.d_in = self.d_out = d_in
        self.d_sae = config.d_sae

    @property
    def lr(self) -> float:
        """Return the peak learning rate; where none is published, 2e-4 / sqrt(d_sae / 2^14) (arXiv 2406.04093, A.3)."""
        return self.config.lr or self.default_lr or 2e-4 / (self.d_sae / 2**14) ** 0.5

    @property
    def adam_betas(self) -> tuple[float, float]:
        """Return Adam's decay rates."""
        given = self.config.beta1, self.config.beta2
        beta1, beta2 = (own if beta is None else beta for beta, own in zip(given, self.betas, strict=True))
        return beta1, beta2

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the values in effect of what the configuration may leave open, named in `resolved`.

        A resumed run compares them: another release may have other defaults.
        """
        held = self.unit_norm_decoder if self.config.unit_norm_decoder is None else self.config.unit_norm_decoder
        return {"unit_norm_decoder": held} | {name: getattr(self, name) for name in self.resolved}

    @property
    def aux_coefficient(self) -> float:
        """Return the weight of the loss that revives dead latents; 1/32 if not given (arXiv 2406.04093, A.2)."""
        given = self.config.aux_coefficient
        return (1 / 32 if self.revives_dead else 0.0) if given is None else given

    @property
    def lr_scales(self) -> dict[str, float]:
        """Return factors of the learning rate by parameter, where they are not one."""
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
        """Return what training keeps besides the parameters, such as running means."""
        return {}

    def decided_at(self, steps_done: int) -> Hashable | None:
        """Return what the host decides of a step, so that a captured one is replayed only where it is the same.

        None says that what it decides changes too often for a capture to be worth its time.
        """
        return ()

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Change random initial parameters in place by what the first batch shows, where an architecture does."""

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients at these parameters."""
        raise NotImplementedError

    def exported(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization
    ) -> tuple[str, dict[str, Tensor]]:
        """Return the saved architecture and its tensors in raw activation units.

        Latents scale with the input, so the encoder's weights stay, its bias is divided by the
        scale, and the decoder keeps its norms.
        """
        return self.name, {
            "W_enc": parameters["W_enc"].T,
            "b_enc": parameters["b_enc"] / normalization.scale,
            "W_dec": parameters["W_dec"],
            "b_dec": parameters["b_dec"] / normalization.scale + normalization.mean.to(parameters["b_dec"].dtype),
        }

    def hyperparameters(self) -> dict[str, Any]:
        """Return what the saved SAE says about its training."""
        keys = (
            "architecture",
            "d_sae",
            "k",
            "l1_coefficient",
            "l0_coefficient",
            "target_l0",
            "seed",
        )
        values = {key: getattr(self.config, key) for key in keys}
        if self.revives_dead:
            values["aux_coefficient"] = self.aux_coefficient
        return {key: value for key, value in values.items() if value is not None} | {"lr": self.lr}

    def to_sae(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization, metadata: dict[str, Any]
    ) -> Sae:
        """Return the SAE for inference on raw activations."""
        architecture, tensors = self.exported(parameters, buffers, normalization)
        return Sae(
            architecture,
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
            hook_point=self.config.hook_point,
            config=self.hyperparameters(),
            metadata=metadata,
        )
