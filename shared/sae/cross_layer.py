"""A cross-layer transcoder for inference, in raw activation units (Anthropic, "Circuit Tracing", March 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..core.errors import SaeError
from . import activations
from .formats.cross_layer import ARCHITECTURE
from .formats.parts import SaeParts
from .sae import Sae

_SPARSE_BELOW = 1 / 16


class Sizes(NamedTuple):
    """The number of layers, and the latents, input width and output width of each layer."""

    n_layers: int
    d_sae: int
    d_in: int
    d_out: int

    def __str__(self) -> str:
        """Return a description of the sizes."""
        return (
            f"{self.n_layers} layers of {self.d_sae} latents that read {self.d_in} channels and write {self.d_out} each"
        )


class CrossLayerTranscoder(Sae, architecture=ARCHITECTURE):
    """Several transcoders whose latents each write to the targets of their own and all later layers.

    `f_l` are chosen from `x_l W_enc_l^T + b_enc_l`, and `y_hat_m = sum_{l <= m} f_l W_dec_l[:, m - l] + b_dec_m`. Rows
    are those of all layers side by side: `d_in`, `d_out` and `d_sae` count all layers. `sizes` are those of one layer.

    Tensors have the names and shapes of circuit-tracer's: for each layer i, `W_enc_{i}` `[d_sae, d_in]`, `b_enc_{i}`
    `[d_sae]`, `W_dec_{i}` `[d_sae, n - i, d_out]`, `b_dec_{i}` `[d_out]`, with thresholds `threshold_{i}` `[d_sae]`,
    and with skip paths `W_skip_{i}` `[d_out, d_in]`, by which `W_skip_i x_i` is added to the target of its own layer.
    `config` says what is read (`reads`) and written (`writes`), how latents are chosen (`activation`: relu, jumprelu or
    topk), and for topk how many (`k`), of all layers together or of each (`select_over`: all or layer).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        config: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
    ):
        nn.Module.__init__(self)
        self.architecture = ARCHITECTURE
        self.config = dict(config)
        self.metadata = dict(metadata or {})
        self.format, self.folded = "", ()
        self.hook_point = self.reads[0]
        self.selection, self.wiring_kind = "cross_layer", "cross_layer"
        self.activation = str(config["activation"])
        self.select_over = str(config.get("select_over", "all"))
        self.apply_b_dec_to_input, self.normalize_activations, self.is_signed = False, "none", False
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        d_sae, d_in = self.get_parameter("W_enc_0").shape
        self.sizes = Sizes(len(self.reads), d_sae, d_in, len(self.get_parameter("b_dec_0")))
        n, d_sae, d_in, d_out = self.sizes
        self.d_in, self.d_sae, self.d_out = n * d_in, n * d_sae, n * d_out

    @classmethod
    def _of(cls, parts: SaeParts) -> CrossLayerTranscoder:
        if parts.architecture != ARCHITECTURE:
            raise SaeError(
                f"expected a cross-layer transcoder, got a '{parts.architecture}' SAE; load it with Sae.load"
            )
        sae = cls(parts.tensors, config=parts.config, metadata=parts.metadata)
        sae.format, sae.folded = parts.format, parts.folded
        return sae

    @property
    def has_thresholds(self) -> bool:
        """Whether each latent has a threshold that it must exceed to fire."""
        return self.activation == "jumprelu"

    @property
    def target_hook_point(self) -> str:
        """Not defined: there is a target for each layer, in `writes`."""
        raise SaeError("a cross-layer transcoder reconstructs several hook points, which its `writes` names")

    @property
    def chooses_by_layer(self) -> bool:
        """Whether a layer's latents depend only on its own input, as is needed to replace one MLP after another."""
        return self.activation != "topk" or self.select_over == "layer"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.get_parameter("W_enc_0").device

    def parts(self) -> SaeParts:
        """Return what a writer of a format needs: the tensors, without copies, and what is known of the transcoder."""
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return SaeParts(ARCHITECTURE, tensors, "", dict(self.config), dict(self.metadata))

    def save(self, path: str | Path, format: str = "thresher") -> Path:
        """Write the transcoder as a folder that `Sae.load` reads, or in another format."""
        return super().save(path, format)

    def fold_decoder_norm(self) -> None:
        """Give each latent's decoders, for all its targets one after another, norm one; latents take the norms.

        Raises:
            SaeError: latents are chosen by their size, which would change.
        """
        if self.activation == "topk":
            raise SaeError("decoder norms of a topk transcoder cannot be folded: that would change which latents fire")
        with torch.no_grad():
            for i in range(self.sizes.n_layers):
                W_dec = self.get_parameter(f"W_dec_{i}")
                norms = torch.linalg.vector_norm(W_dec, dim=(1, 2)).clamp_min(1e-8)
                W_dec.div_(norms[:, None, None])
                self.get_parameter(f"W_enc_{i}").mul_(norms[:, None])
                for name in ("b_enc", "threshold"):
                    if f"{name}_{i}" in self._parameters:
                        self.get_parameter(f"{name}_{i}").mul_(norms)

    def decoder_norms(self, n_targets: int | None = None) -> Float[Tensor, "d_sae targets"]:
        """Return the norm of each latent's decoder for each target, zero for those that it does not write."""
        n, d_sae, *_ = self.sizes
        norms = self.get_parameter("W_dec_0").new_zeros(n, d_sae, n)
        for i in range(n):
            norms[i, :, i:] = self.get_parameter(f"W_dec_{i}").norm(dim=2)
        return norms.view(n * d_sae, n)

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the encoders' linear part."""
        parts = enumerate(x.chunk(self.sizes.n_layers, dim=-1))
        return torch.cat([self._pre_activations(i, part) for i, part in parts], dim=-1)

    def _pre_activations(self, layer: int, x: Tensor) -> Tensor:
        W_enc = self.get_parameter(f"W_enc_{layer}")
        return nn.functional.linear(x.to(W_enc.dtype), W_enc, self.get_parameter(f"b_enc_{layer}"))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of all layers."""
        if not self.chooses_by_layer:
            return activations.topk(self.pre_activations(x), int(self.config["k"]))
        parts = enumerate(x.chunk(self.sizes.n_layers, dim=-1))
        return torch.cat([self.encode_layer(i, part) for i, part in parts], dim=-1)

    def encode_layer(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return one layer's latents from that layer's input.

        Raises:
            SaeError: they depend on other layers' inputs.
        """
        pre_acts = self._pre_activations(layer, x)
        if self.activation == "jumprelu":
            return activations.jumprelu(pre_acts, self.get_parameter(f"threshold_{layer}"))
        if self.activation == "relu":
            return activations.relu(pre_acts)
        if not self.chooses_by_layer:
            raise SaeError("the k largest latents of all layers cannot be chosen from what one layer reads")
        return activations.topk(pre_acts, int(self.config["k"]))

    def decode(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstructions of all targets; `x` is not used."""
        flat = latents.reshape(-1, self.d_sae)
        written: list[Tensor] = []
        for i, part in enumerate(flat.chunk(self.sizes.n_layers, dim=1)):
            for j, contribution in enumerate(self.decode_layer(i, part)):
                if i == 0:
                    written.append(contribution)
                else:
                    written[i + j] = written[i + j] + contribution
        biases = [self.get_parameter(f"b_dec_{i}") for i in range(self.sizes.n_layers)]
        y_hat = torch.cat([total + bias for total, bias in zip(written, biases, strict=True)], dim=1)
        return y_hat.view(*latents.shape[:-1], self.d_out)

    def decode_layer(self, layer: int, latents: Float[Tensor, "rows d_sae"]) -> Sequence[Float[Tensor, "rows d_out"]]:
        """Return what one layer's latents write to this and each later layer's target, without `b_dec`.

        If few latents fire, only their decoder rows are read.
        """
        W_dec = self.get_parameter(f"W_dec_{layer}").flatten(1)
        active = latents > 0
        n_active = int(torch.count_nonzero(active)) if not latents.requires_grad else latents.numel()
        if n_active >= _SPARSE_BELOW * latents.numel():
            written = latents @ W_dec
        else:
            indices = active.nonzero()[:, 1]
            offsets = nn.functional.pad(active.sum(1).cumsum(0), (1, 0))
            written = nn.functional.embedding_bag(
                indices, W_dec, offsets, mode="sum", per_sample_weights=latents[active], include_last_offset=True
            )
        return written.chunk(self.sizes.n_layers - layer, dim=1)

    def decode_sparse(
        self,
        top_acts: Float[Tensor, "batch m"],
        top_indices: Int64[Tensor, "batch m"],
        x: Float[Tensor, "batch d_in"] | None = None,
    ) -> Float[Tensor, "batch d_out"]:
        """Return the reconstructions from sparse latents; `x` is not used."""
        latents = top_acts.new_zeros(len(top_acts), self.d_sae).scatter_add_(1, top_indices, top_acts)
        return self.decode(latents)

    def skip_layer(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | None:
        """Return what a layer's skip path adds to its own target, or None without one."""
        if f"W_skip_{layer}" not in self._parameters:
            return None
        W_skip = self.get_parameter(f"W_skip_{layer}")
        return x.to(W_skip.dtype) @ W_skip.T

    def skip_path(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | None:
        """Return what the skip paths of all layers add to the targets, or None without them."""
        skips = [self.skip_layer(i, part) for i, part in enumerate(x.chunk(self.sizes.n_layers, dim=-1))]
        found = [skip for skip in skips if skip is not None]
        return torch.cat(found, dim=-1) if found else None
