"""The base of architectures: initial weights, a loss with its gradients, and export to and import from an `Sae`.

Inputs are centred on the store's mean and scaled. `b_dec` therefore starts at zero, which is the mean of the
activations, and bfloat16 spends its precision on what varies. While training, `W_enc` is `[d_sae, d_in]`, one row per
latent as in `W_dec`, which is the layout of the sparse operations.
"""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.core.errors import ConfigError, SaeError
from ...shared.sae import Sae
from ...shared.sae.formats.files import saelens_hook_name
from ...shared.sae.formats.kinds import Kind
from ..config import SaeConfig
from ..kernels.fused_state import TopKOptions
from ..stream.normalization import Normalization
from ..stream.rotation import Rotation
from .contract import Batch, Buffers, L0Target, Parameters, StepInput, StepOutput, is_per_latent
from .parts.decoder_norms import DecoderNorms, are_unit_norms, fold_decoder_norms
from .parts.raw_units import in_order, to_normalized, to_raw

_C = TypeVar("_C", bound=SaeConfig)

ROTATED = ("W_enc", "W_dec", "b_dec", "W_skip")  # the parameters that have a coordinate per channel


class Architecture(Generic[_C]):
    """Base of the architectures: `config` holds the keys of its `[[sae]]` table.

    A subclass sets `saved_as` to the selection of the SAE that `exported` returns, and `resolved` to the names of
    properties whose values have defaults. `kind_of_wiring` is the only kind of `Wiring` that its step supports, or None
    for all except cross-layer ones. If `folds_norms`, decoder norms are folded into the encoder on saving.

    A class declares what only its own step is known to do; these are not inherited (see `declares`):

    - `capturable`: a step with `room` never synchronises with the device and always launches the same kernels, except
      where `decided_at` changes.
    - `shardable`: a step needs of the latents only what `StepInput.across` gives, so that ranks may share them.
    - `fusable`: the step is the one that `fused_options` describes.
    - `weighs_rows`: the step multiplies errors by `Batch.row_weights`, and takes rows of any length.
    """

    saved_as: ClassVar[str]
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 6.25e-10
    default_lr: ClassVar[float | None] = None
    kind_of_wiring: ClassVar[str | None] = "sae"
    folds_norms: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    shardable: ClassVar[bool] = False
    fusable: ClassVar[bool] = False
    weighs_rows: ClassVar[bool] = False
    latents_here: slice | None = None
    resolved: ClassVar[tuple[str, ...]] = ("lr", "adam_betas", "eps", "lr_scales", "unit_norm_decoder")

    def __init__(self, config: _C, d_in: int, d_out: int | None = None):
        self.config = config
        self.d_in, self.d_out = d_in, d_out or d_in
        self.d_sae = config.d_sae

    @property
    def first_norm(self) -> float:
        """The norm of decoder and encoder rows before training."""
        return 1.0

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm."""
        return True

    @property
    def revives_dead(self) -> bool:
        """Whether the loss depends on which latents are dead; if not, `StepInput.dead` is None."""
        return False

    @classmethod
    def declares(cls, name: str) -> bool:
        """Return whether this class itself, not a parent whose step it may override, sets an attribute to true."""
        return bool(vars(cls).get(name, False))

    @property
    def needs_all_latents(self) -> str | None:
        """What prevents ranks from sharing the latents, in words; None if nothing does."""
        return None if self.declares("shardable") else f"architecture '{self.config.architecture}'"

    def sharded(self, latents: slice) -> Self:
        """Return the architecture that trains only some of the latents."""
        some = copy(self)
        some.latents_here = latents
        return some

    def part_here(self, parameters: Parameters) -> Parameters:
        """Return the rows of the latents that are trained here, of all latents' parameters."""
        rows = self.latents_here
        if rows is None:
            return parameters
        return {name: tensor[rows].clone() if is_per_latent(name) else tensor for name, tensor in parameters.items()}

    @property
    def not_fused(self) -> str | None:
        """Why fused kernels cannot take this step whole, in words; None if they can."""
        return None if self.declares("fusable") else "only plain topk has fused kernels"

    def fused_options(self, total_variance: float, dead_after_tokens: int) -> TopKOptions | None:
        """Return the options of the fused kernels that take this step whole; None if there are none."""
        return None

    @property
    def schedules(self) -> dict[str, tuple[int | None, str]]:
        """Keys whose number of steps must not exceed the run: their values, and the effect of a shorter run."""
        return {}

    @property
    def note(self) -> str | None:
        """A sentence for the plan on how to read the metrics, with `{}` for the SAEs' names."""
        return None

    def sparsity_warmup_steps(self, n_steps: int) -> int:
        """Return the number of steps over which a step's `sparsity_scale` grows from 0 to 1 in a run of `n_steps`."""
        return 0

    @property
    def l0_target(self) -> L0Target | None:
        """The target of the controller of the sparsity penalty's factor, or None without a controller."""
        return None

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

        A run that resumes compares them, because the defaults may differ between releases.
        """
        return {name: getattr(self, name) for name in self.resolved}

    @property
    def lr_scales(self) -> dict[str, float]:
        """Return the factors of the learning rate that are not 1, by parameter."""
        scale = self.config.decoder_lr_scale or 1.0
        return {} if scale == 1.0 else {"W_dec": scale}

    @property
    def undecayed(self) -> frozenset[str]:
        """Return the parameters whose learning rate does not fall at the end of the run."""
        return frozenset()

    @cached_property
    def centred(self) -> bool:
        """Whether the encoder subtracts `b_dec`: only if a single hook point is both read and written."""
        return self.config.wiring.kind == "sae"

    @property
    def frozen(self) -> frozenset[str]:
        """Return the parameters that training leaves as they are."""
        return frozenset(self.config.freeze or ())

    def decoder_norms(self, W_dec: Float[Tensor, "d_sae d_out"]) -> DecoderNorms:
        """Return the norms of decoder rows at the hook points that are written."""
        return DecoderNorms.of(W_dec, len(self.config.wiring.writes))

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return random decoder rows of norm `first_norm`, the encoder as their transpose, and zero biases.

        If the widths read and written differ, the encoder's rows are random as well. A skip path starts at zero.
        """
        W_dec = torch.randn(self.d_sae, self.d_out, generator=generator)
        norms = W_dec.norm(dim=1, keepdim=True)
        # The two round differently; each is kept as in earlier releases, so that weights stay the same.
        W_dec = (W_dec / norms).mul_(self.first_norm) if self.centred else W_dec * (self.first_norm / norms)
        W_enc = W_dec.clone()
        if self.d_in != self.d_out:
            W_enc = torch.randn(self.d_sae, self.d_in, generator=generator)
            W_enc = W_enc * (self.first_norm / W_enc.norm(dim=1, keepdim=True))
        skip = {"W_skip": torch.zeros(self.d_out, self.d_in)} if self.config.wiring.skip else {}
        return {
            "W_enc": W_enc,
            "b_enc": torch.zeros(self.d_sae),
            "W_dec": W_dec,
            "b_dec": torch.zeros(self.d_out),
            **skip,
        }

    def rotated(self, parameters: Parameters, by: Normalization, back: bool = False) -> Parameters:
        """Return parameters for rows that are rotated; with `back`, for those before rotation."""
        turns = by.rotation, (by.target or by).rotation
        pair = [turn.inverse if back else turn for turn in turns if turn is not None]
        return self.turned(parameters, *pair) if pair else parameters

    def turned(self, parameters: Parameters, source: Rotation, target: Rotation) -> Parameters:
        """Return parameters for inputs and targets that are multiplied by matrices; those in `ROTATED` change."""
        turns = {"W_enc": source, "W_dec": target, "b_dec": target}
        found = {name: turns[name](tensor) if name in turns else tensor for name, tensor in parameters.items()}
        if "W_skip" in found:
            found["W_skip"] = target(source(found["W_skip"]).T).T.contiguous()
        return found

    def initial_buffers(self) -> Buffers:
        """Return the state of training besides parameters, such as running means."""
        return {}

    def decided_at(self, steps_done: int) -> Hashable | None:
        """Return the host's decisions about a step. A captured step is replayed only if they are the same.

        Returns None while they change too often for captures to pay off.
        """
        return ()

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Adapt random initial parameters to the first batch, in place; by default, do nothing."""

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients at these parameters."""
        raise NotImplementedError

    def latent_unit(self, normalization: Normalization) -> float:
        """Return the factor that latents are divided by on saving; 1 if decoder norms are folded into them afterwards.

        If other hook points are written than read, decoder rows of norm one keep that norm; with several targets, only
        approximately.
        """
        if self.centred:
            return float(normalization.scale)
        scale = (normalization.target or normalization).scale
        return 1.0 if self.folds_norms else float(torch.as_tensor(scale).mean())

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return the saved SAE's tensors, in raw activation units.

        If an SAE reads what it writes, latents scale with the input: the encoder's weights are unchanged, its bias is
        divided by the scale, and the decoder keeps its norms.
        """
        if not self.centred:
            return to_raw(parameters, normalization, self.latent_unit(normalization))
        return {
            "W_enc": parameters["W_enc"].T,
            "b_enc": parameters["b_enc"] / normalization.scale,
            "W_dec": parameters["W_dec"],
            "b_dec": parameters["b_dec"] / normalization.scale + normalization.mean.to(parameters["b_dec"].dtype),
        }

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return saved tensors with decoder norms folded into the encoder."""
        return fold_decoder_norms(tensors, 1 if self.centred else len(self.config.wiring.writes))

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters and buffers with which training starts from an SAE: the inverse of `exported`.

        The SAE must be of the kind `saved_name` and have this architecture's sizes. Latents and reconstructions stay
        the same, except for what `differences` returns.

        Raises:
            SaeError: the architecture cannot represent what the SAE computes.
        """
        tensors = self.held(sae, normalization)
        return {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip") if name in tensors}, (
            self.initial_buffers()
        )

    def held(self, sae: Sae, normalization: Normalization) -> dict[str, Tensor]:
        """Return an SAE's tensors in training's units and layout.

        Decoder norms are folded into the encoder if training holds them at one.
        """
        if self.centred:
            return self._held_centred(sae, normalization)
        tensors = to_normalized(sae, self.config.wiring, normalization, self.latent_unit(normalization))
        if self.folds_norms or (self.unit_norm_decoder and not are_unit_norms(tensors["W_dec"].norm(dim=1))):
            tensors = self.fold(tensors)
        return tensors | {"W_enc": tensors["W_enc"].T.contiguous()}

    def _held_centred(self, sae: Sae, normalization: Normalization) -> dict[str, Tensor]:
        tensors, scale = {name: tensor.detach() for name, tensor in sae.named_parameters()}, normalization.scale
        if self.unit_norm_decoder and not are_unit_norms(sae.W_dec.detach().norm(dim=1)):
            tensors = fold_decoder_norms(tensors)
        W_enc = tensors["W_enc"].T.contiguous()
        found = {"W_enc": W_enc, "W_dec": tensors["W_dec"], "b_dec": (tensors["b_dec"] - normalization.mean) * scale}
        for name in ("b_enc", "b_gate"):
            if name in tensors:
                found[name] = bias_of_centred(sae, tensors[name], W_enc) * scale
        if "b_mag" in tensors:
            # Magnitudes are scaled before their bias is added, and the bias includes the term that is not subtracted.
            b_gate = bias_of_centred(sae, tensors["b_gate"], W_enc)
            b_mag = tensors["b_mag"] + (b_gate - tensors["b_gate"]) * tensors["r_mag"].exp()
            found |= {"b_mag": b_mag * scale, "r_mag": tensors["r_mag"]}
        for name in ("threshold", "first_threshold"):
            if name in tensors:
                found[name] = tensors[name] * scale
        return found

    def decoder_norms_of(self, sae: Sae, normalization: Normalization) -> Float[Tensor, " d_sae"]:
        """Return the norms that an SAE's decoder rows would have in training."""
        W_dec = sae.W_dec.detach()
        if self.centred:
            return W_dec.norm(dim=1)
        tensors = to_normalized(sae, self.config.wiring, normalization, self.latent_unit(normalization))
        return tensors["W_dec"].norm(dim=1)

    def check_source(self, sae: Sae) -> None:
        """Raise `SaeError` if training cannot start from an SAE of the right kind and sizes."""
        if sae.normalizes_rows:
            raise SaeError(
                f"it normalises each row by itself ({sae.normalize_activations}), and training takes rows as they are"
            )
        in_order(sae, self.config.wiring)

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Return lines for the user on how the first step differs from the SAE's computation or use."""
        wiring = self.config.wiring
        found = [
            f"it is of a model loaded with {name} = true, this one of the model as it is"
            for name in sae.model_processing
        ]
        if wiring.kind == "crosscoder":
            for theirs, ours in ((sae.reads, wiring.reads), (sae.writes, wiring.writes)):
                line = f"its hook points {list(theirs)} are put in this SAE's order"
                if theirs != ours and line not in found:
                    found.append(line)
        elif sae.hook_point and sae.hook_point != self.config.hook_point:
            found.append(f"it is of '{sae.hook_point}', this one of '{self.config.hook_point}'")
        norms = self.decoder_norms_of(sae, normalization)
        if self.unit_norm_decoder and not are_unit_norms(norms):
            found.append(
                f"its decoder norms, {float(norms.min()):.3g} to {float(norms.max()):.3g}, move into the encoder: "
                "latents are scaled by them, and reconstructions stay"
            )
        if wiring.kind == "transcoder" and sae.target_hook_point != wiring.writes[0]:
            found.append(f"it reconstructs '{sae.target_hook_point}', this one '{wiring.writes[0]}'")
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe()

    def _describe(self, *keys: str, **resolved: Any) -> dict[str, Any]:
        """Return the shared hyperparameters, those in `keys` that are set, and the `resolved` values."""
        values = {key: getattr(self.config, key) for key in ("architecture", "d_sae", *keys, "seed")}
        frozen = {"freeze": sorted(self.frozen)} if self.frozen else {}
        return {key: value for key, value in values.items() if value is not None} | frozen | resolved | {"lr": self.lr}

    @property
    def saved_name(self) -> str:
        """The `architecture` in the saved SAE's `cfg.json`."""
        return Kind(self.saved_as, self.config.wiring.kind, self.config.wiring.skip).name

    def to_sae(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization, metadata: dict[str, Any]
    ) -> Sae:
        """Return the SAE for inference on raw activations, with the names of what it reads and writes."""
        tensors, wiring = self.exported(parameters, buffers, normalization), self.config.wiring
        config, places = self.hyperparameters(), {}
        if wiring.kind == "crosscoder":
            same = wiring.reads == wiring.writes
            both = {"reads": list(wiring.reads), "writes": list(wiring.writes)}
            config |= ({"hook_points": list(wiring.reads)} if same else both) | {"apply_b_dec_to_input": False}
        elif wiring.kind == "transcoder":
            places = {"hook_name_out": saelens_hook_name(wiring.writes[0])}
        return Sae(
            self.saved_name,
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
            hook_point=self.config.hook_point,
            config=config,
            metadata=metadata | places,
        )


def bias_of_centred(sae: Sae, bias: Tensor, W_enc: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Return an SAE's encoder bias for inputs from which `b_dec` is subtracted, as not every SAE does."""
    return bias if sae.apply_b_dec_to_input else bias + W_enc @ sae.b_dec.detach()


def check_number_of_latents(config: SaeConfig, key: str, given: float | None) -> None:
    """Raise `ConfigError` if a key asks for more active latents than there are."""
    if given is None or given <= config.n_latents:
        return
    limit = f"the {config.n_latents} latents of all layers" if config.cross_layer else f"d_sae = {config.d_sae}"
    raise ConfigError(f"{key} is {given:g}, expected at most {limit}; give a smaller {key}")
