"""Cross-layer transcoders that keep the largest latents: TopK of each row, and BatchTopK of a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...kernels.entries import entries_of
from ...stream.normalization import Normalization
from ..batch_topk import MOMENTUM, BatchTopK, BatchTopKConfig
from ..contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from ..parts.decoder_norms import NORM_TOLERANCE
from ..parts.first_batch import PUBLISHED_NORM
from ..parts.latents import SparseLatents, count
from ..registry import register
from ..topk import CompetingConfig, TopK, TopKConfig
from .auxk import add_auxk_across
from .base import CrossLayer
from .layers import LayerInput, squared_errors
from .selection import entries_at, largest_of_batch_and_layers

_L = TypeVar("_L", bound=CompetingConfig)


class CrossLayerLargest(CrossLayer[_L], TopK[_L]):
    """Loss `sum_m ||y_m - y_hat_m||^2 / sum_m Var(y_m)` and AuxK.

    With `select_over = "all"`, the k largest latents of a row are chosen among all layers; with `"layer"`, k in each
    layer. Latents are chosen by their values, independently of their decoders' norms, so norms are kept on saving.
    """

    folds = False

    @property
    def first_norm(self) -> float:
        """The norm of encoder rows, and of a latent's decoders, before training."""
        return PUBLISHED_NORM

    @property
    def over_all(self) -> bool:
        """Whether latents are chosen among all layers."""
        return self.config.select_over != "layer"

    def choose(self, inputs: Sequence[LayerInput], step: StepInput) -> list[SparseLatents]:
        """Return each layer's chosen entries, positive or not."""
        raise NotImplementedError

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        layers, y = self.layers, batch.x if batch.target is None else batch.target
        inputs = layers.inputs(parameters, batch, step)
        latents = self.choose(inputs, step)
        values = [some.pre_acts.relu() for some in latents]
        W_dec = parameters["W_dec"] if step.W_dec_compute is None else step.W_dec_compute
        errors = layers.errors(latents, values, W_dec, parameters["b_dec"], y)
        mse = squared_errors(errors) / len(y)
        scale = 2 / (len(y) * step.total_variance)
        by_pre_acts = [
            torch.where(acts > 0, layers.grad_values(i, some, errors, parameters["W_dec"]).mul_(scale), 0)
            for i, (some, acts) in enumerate(zip(latents, values, strict=True))
        ]
        gradients = layers.gradients_of(parameters, inputs, latents, errors, values, by_pre_acts, scale)
        terms: dict[str, Number] = {"mse_loss": mse / step.total_variance}
        if step.dead is not None and self.aux_coefficient > 0:
            terms["auxk_loss"] = add_auxk_across(
                gradients, layers, parameters, inputs, errors, step.dead, self.k_aux, self.aux_coefficient, step.across
            )
        fired = torch.cat([some.fired() for some in latents])
        l0 = torch.stack([count(acts > 0) for acts in values]).sum() / len(y)
        return StepOutput(gradients, fired, sum(terms.values()), mse, l0, terms)

    def hyperparameters(self) -> dict[str, Any]:
        """Also return `select_over`."""
        return super().hyperparameters() | {"select_over": "all" if self.over_all else "layer"}


@register(TopKConfig, cross_layer=True)
class CrossLayerTopK(CrossLayerLargest[TopKConfig]):
    """TopK: the k largest latents of each row, among all layers or in each layer."""

    activation = "topk"
    refused = (*CrossLayer.refused, "k_anneal_steps", "multi_topk_coefficient")

    @property
    def note(self) -> str | None:
        """A note if latents are chosen among all layers, because the model cannot be run with such a transcoder."""
        if not self.over_all:
            return None
        return (
            "{} chooses the k largest latents of all layers, which is impossible before the later layers have run, so "
            'it cannot be evaluated in the model; for that use select_over = "layer", or batch_topk'
        )

    def choose(self, inputs: Sequence[LayerInput], step: StepInput) -> list[SparseLatents]:
        """Return each layer's chosen entries."""
        k = min(self.config.k, self.layers.d_sae)
        found = [step.kernels.select_topk(one.x_compute, one.W_enc_compute, one.b_enc, k) for one in inputs]
        if self.over_all:
            acts = torch.cat([acts for acts, _ in found], dim=1)
            largest = acts.topk(self.config.k, dim=1, sorted=False)
            kept = torch.zeros_like(acts, dtype=torch.bool).scatter_(1, largest.indices, largest.values > 0)
            chosen = [entries_of(part) for part in kept.chunk(len(inputs), dim=1)]
        else:
            chosen = [entries_of(acts > 0) for acts, _ in found]
        latents = []
        for one, (_, top), (places, offsets) in zip(inputs, found, chosen, strict=True):
            rows = torch.repeat_interleave(torch.arange(len(top), device=top.device), offsets.diff())
            latents.append(entries_at(one, step, top[rows, places].long(), offsets))
        return latents


@register(BatchTopKConfig, cross_layer=True)
class CrossLayerBatchTopK(CrossLayerLargest[BatchTopKConfig], BatchTopK[BatchTopKConfig]):
    """BatchTopK: the `batch * k` largest latents of a batch, among all layers or in each layer.

    Saved with one threshold for all latents, or one per layer: the running mean of each batch's smallest kept latent.
    """

    activation = "jumprelu"

    def initial_buffers(self) -> Buffers:
        """Return the running thresholds, negative until the first batch sets them."""
        return {"threshold": torch.full((1 if self.over_all else self.layers.n,), -1.0)}

    def choose(self, inputs: Sequence[LayerInput], step: StepInput) -> list[SparseLatents]:
        """Return each layer's chosen entries, and update the running thresholds."""
        groups = [inputs] if self.over_all else [[one] for one in inputs]
        latents = [some for group in groups for some in largest_of_batch_and_layers(group, step, self.config.k)]
        smallest = torch.stack([_smallest_positive(some.pre_acts) for some in latents])
        if self.over_all:
            smallest = smallest.amin(0, keepdim=True)
        smallest, threshold = step.across.least(smallest), step.buffers["threshold"]
        moved = torch.where(threshold < 0, smallest, torch.lerp(smallest, threshold, MOMENTUM))
        threshold.copy_(torch.where(torch.isfinite(smallest), moved, threshold))
        return latents

    def thresholds(self, parameters: Parameters, buffers: Buffers) -> Float[Tensor, " all_latents"]:
        """Return the running thresholds, by latent."""
        by_layer = buffers["threshold"].clamp_min(0).expand(self.layers.n)
        return by_layer.repeat_interleave(self.layers.d_sae)

    def differences(self, sae: Any, normalization: Normalization) -> list[str]:
        """Also report thresholds that are averaged."""
        found = super().differences(sae, normalization)
        thresholds = torch.cat([sae.get_parameter(f"threshold_{i}") for i in range(self.layers.n)])
        by_layer = thresholds.view(1 if self.over_all else self.layers.n, -1)
        if ((by_layer.amax(1) - by_layer.amin(1)) > NORM_TOLERANCE * by_layer.mean(1).abs()).any():
            least, most, kept = (
                float(thresholds.min()),
                float(thresholds.max()),
                "one" if self.over_all else "one a layer",
            )
            found.append(f"its thresholds, {least:.3g} to {most:.3g}, become {kept}, their mean")
        return found

    def with_thresholds(
        self, parameters: Parameters, threshold: Float[Tensor, " all_latents"] | None
    ) -> tuple[Parameters, Buffers]:
        """Return the mean of the thresholds, over all latents or per layer, as running thresholds."""
        assert threshold is not None
        by_layer = threshold.view(1 if self.over_all else self.layers.n, -1)
        return parameters, {"threshold": by_layer.mean(1)}


def _smallest_positive(pre_acts: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
    """Return the smallest positive value, or infinity if there is none."""
    positive = pre_acts.where(pre_acts > 0, torch.inf).float()
    return positive.amin() if len(positive) else positive.new_full((), torch.inf)
