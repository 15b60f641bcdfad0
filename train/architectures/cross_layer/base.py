"""The base of cross-layer transcoders (Anthropic, "Circuit Tracing", March 2025)."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.errors import ConfigError, SaeError
from ....shared.sae import CrossLayerTranscoder
from ....shared.sae.cross_layer import Sizes
from ...config import SaeConfig
from ...stream.normalization import Normalization
from ...stream.rotation import Rotation
from ..base import Architecture
from ..contract import Batch, Buffers, Parameters
from ..parts.first_batch import exceeded_by
from .layers import Layers

_C = TypeVar("_C", bound=SaeConfig)


class CrossLayer(Architecture[_C]):
    """Base: `f_l` from `W_enc_l x_l + b_enc_l`, and `y_hat_m = sum_{l <= m} f_l W_dec[l -> m] + b_dec_m`.

    `b_dec` starts at the targets' means; encoders do not subtract it. Decoder norms are unconstrained in training. A
    latent's norm is the norm of its decoders for all targets, concatenated.

    A subclass also inherits from the architecture whose selection and keys it uses. `activation` is the activation of
    the saved transcoder, `folds` says whether norms are folded into the encoder on saving, and `refused` lists keys of
    the table that do not apply across layers.
    """

    saved_as = "cross_layer_transcoder"
    kind_of_wiring = "cross_layer"
    activation: ClassVar[str]
    folds: ClassVar[bool] = True
    refused: ClassVar[tuple[str, ...]] = ("unit_norm_decoder", "resample_every_tokens")

    def __init__(self, config: _C, d_in: int, d_out: int | None = None):
        super().__init__(config, d_in, d_out)
        for key in self.refused:
            if getattr(config, key, None) is not None:
                raise ConfigError(f"'{key}' is given, but a cross-layer transcoder does not use it; leave it out")
        n = len(config.wiring.reads)
        self.layers = Layers(n, config.d_sae, self.d_in // n, self.d_out // n)
        self.d_sae = n * config.d_sae

    @property
    def needs_all_latents(self) -> str | None:
        """Its latents are those of several layers."""
        return "cross-layer transcoders"

    @property
    def saved_name(self) -> str:
        """The `architecture` in the saved transcoder's `cfg.json`."""
        return self.saved_as

    @property
    def unit_norm_decoder(self) -> bool:
        """Decoder norms are not constrained."""
        return False

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return random decoders and an encoder, whose rows have the first norm.

        Encoder rows have the directions of the decoders for the same layer if the widths are equal; otherwise they are
        random.
        """
        layers = self.layers
        W_dec = torch.randn(layers.n_pairs * layers.d_sae, layers.d_out, generator=generator)
        if layers.d_in == layers.d_out:
            W_enc = torch.cat([W_dec[layers.decoder(layer, layer)] for layer in range(layers.n)])
        else:
            W_enc = torch.randn(self.d_sae, layers.d_in, generator=generator)
        return {
            "W_enc": W_enc * (self.first_norm / W_enc.norm(dim=1, keepdim=True)),
            "b_enc": torch.zeros(self.d_sae),
            "W_dec": layers.scale_decoders(W_dec, self.first_norm / layers.decoder_norms(W_dec)),
            "b_dec": torch.zeros(self.d_out),
        }

    def turned(self, parameters: Parameters, source: Rotation, target: Rotation) -> Parameters:
        """Return parameters for rotated rows: a latent reads one layer, and a decoder writes one target."""
        layers, W_enc, W_dec = self.layers, parameters["W_enc"].clone(), parameters["W_dec"].clone()
        for layer in range(layers.n):
            W_enc[layers.latents(layer)] @= source.axes[layer]
            for to in range(layer, layers.n):
                W_dec[layers.decoder(layer, to)] @= target.axes[to]
        return parameters | {"W_enc": W_enc, "W_dec": W_dec, "b_dec": target(parameters["b_dec"])}

    def exceeded_by(self, parameters: Parameters, batch: Batch, n_rows: int) -> Float[Tensor, " all_latents"]:
        """Return for each latent the value that `W_enc_l x_l` exceeds in so many rows."""
        return torch.cat(
            [
                exceeded_by({"W_enc": parameters["W_enc"][self.layers.latents(i)]}, x, n_rows, centred=False)
                for i, x in enumerate(batch.x.chunk(self.layers.n, dim=1))
            ]
        )

    def thresholds(self, parameters: Parameters, buffers: Buffers) -> Float[Tensor, " all_latents"] | None:
        """Return the thresholds that latents must exceed to fire, if the saved transcoder has thresholds."""
        return None

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return each layer's tensors for raw inputs and targets; each hook point has its own mean and scale."""
        layers, target = self.layers, normalization.target or normalization
        mean, scale = _by_layer(normalization, layers.n)
        target_mean, target_scale = _by_layer(target, layers.n)
        dtype = parameters["W_enc"].dtype
        thresholds, tensors = self.thresholds(parameters, buffers), {}
        for i in range(layers.n):
            rows = layers.latents(i)
            W_enc = parameters["W_enc"][rows] * scale[i]
            tensors[f"W_enc_{i}"] = W_enc
            tensors[f"b_enc_{i}"] = parameters["b_enc"][rows] - W_enc @ mean[i].to(dtype)
            # By latent, then by target: [d_sae, n - i, d_out].
            tensors[f"W_dec_{i}"] = (layers.decoders(parameters["W_dec"], i) / target_scale[i:, None, None]).transpose(
                0, 1
            )
            b_dec = parameters["b_dec"].chunk(layers.n)[i]
            tensors[f"b_dec_{i}"] = b_dec / target_scale[i] + target_mean[i].to(dtype)
            if thresholds is not None:
                tensors[f"threshold_{i}"] = thresholds[rows]
        return _with_folded_norms(tensors, layers.n) if self.folds else tensors

    def imported(self, sae: Any, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters with which training starts from a transcoder: the inverse of `exported`.

        If norms are folded on saving, decoders start at norm one on normalised targets.
        """
        self.check_source(sae)
        layers, target = self.layers, normalization.target or normalization
        mean, scale = _by_layer(normalization, layers.n)
        target_mean, target_scale = _by_layer(target, layers.n)
        saved = {name: tensor.detach() for name, tensor in sae.named_parameters()}
        W_enc, b_enc, W_dec, b_dec = [], [], [], []
        for i in range(layers.n):
            b_enc.append(saved[f"b_enc_{i}"] + saved[f"W_enc_{i}"] @ mean[i])
            W_enc.append(saved[f"W_enc_{i}"] / scale[i])
            by_target = saved[f"W_dec_{i}"].transpose(0, 1) * target_scale[i:, None, None]
            W_dec.append(by_target.reshape(-1, layers.d_out))
            b_dec.append((saved[f"b_dec_{i}"] - target_mean[i]) * target_scale[i])
        parameters = {"W_enc": torch.cat(W_enc), "b_enc": torch.cat(b_enc), "W_dec": torch.cat(W_dec)}
        norms = torch.ones(self.d_sae)
        if self.folds:
            norms = layers.decoder_norms(parameters["W_dec"]).clamp_min(1e-8)
            parameters["W_enc"] *= norms[:, None]
            parameters["b_enc"] *= norms
            parameters["W_dec"] = layers.scale_decoders(parameters["W_dec"], 1 / norms)
        threshold = (
            torch.cat([saved[f"threshold_{i}"] for i in range(layers.n)]) * norms if sae.has_thresholds else None
        )
        parameters["b_dec"] = torch.cat(b_dec)
        return self.with_thresholds(parameters, threshold)

    def with_thresholds(
        self, parameters: Parameters, threshold: Float[Tensor, " all_latents"] | None
    ) -> tuple[Parameters, Buffers]:
        """Return the parameters and buffers that hold thresholds, if there are any."""
        return parameters, self.initial_buffers()

    def check_source(self, sae: Any) -> None:
        """Raise `SaeError` if the transcoder has another activation, other sizes, or other hook points."""
        if not isinstance(sae, CrossLayerTranscoder):
            raise SaeError(f"expected a cross-layer transcoder, got a '{sae.architecture}' SAE")
        layers, wiring = self.layers, self.config.wiring
        wanted = self.activation, Sizes(layers.n, layers.d_sae, layers.d_in, layers.d_out), wiring.reads, wiring.writes
        found = sae.activation, sae.sizes, sae.reads, sae.writes
        for what, a, b in zip(
            ("its latents are chosen by", "it has", "it reads", "it writes"), found, wanted, strict=True
        ):
            if a != b:
                raise SaeError(f"{what} {_shown(a)}; expected {_shown(b)}")

    def differences(self, sae: Any, normalization: Normalization) -> list[str]:
        """Return lines for the user on how the first step differs from what the transcoder computes."""
        return [
            f"it is of a model loaded with {name} = true, this one of the model as it is"
            for name in sae.model_processing
        ]

    def hyperparameters(self) -> dict[str, Any]:
        """Also return the hook points that the saved transcoder reads and writes, and its activation."""
        wiring = self.config.wiring
        own = {"reads": list(wiring.reads), "writes": list(wiring.writes), "activation": self.activation}
        return super().hyperparameters() | own

    def to_sae(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization, metadata: dict[str, Any]
    ) -> CrossLayerTranscoder:
        """Return the transcoder for inference on raw rows, with the rows of all layers concatenated."""
        tensors = self.exported(parameters, buffers, normalization)
        return CrossLayerTranscoder(
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
            config=self.hyperparameters(),
            metadata=metadata,
        )


def _by_layer(normalization: Normalization, n: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Return each layer's mean and scale."""
    mean = normalization.mean.view(n, -1)
    return mean, torch.as_tensor(normalization.scale).to(mean).expand_as(normalization.mean).view(n, -1)[:, 0]


def _with_folded_norms(tensors: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Return tensors with decoder norms folded into the latents."""
    folded = dict(tensors)
    for i in range(n):
        norms = torch.linalg.vector_norm(tensors[f"W_dec_{i}"], dim=(1, 2)).clamp_min(1e-8)
        folded[f"W_enc_{i}"] = tensors[f"W_enc_{i}"] * norms[:, None]
        folded[f"W_dec_{i}"] = tensors[f"W_dec_{i}"] / norms[:, None, None]
        for name in (f"b_enc_{i}", f"threshold_{i}"):
            if name in tensors:
                folded[name] = tensors[name] * norms
    return folded


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if type(value) is tuple else str(value)
