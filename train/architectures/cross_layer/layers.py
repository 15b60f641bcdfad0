"""The sizes of a cross-layer transcoder, and where each layer's parameters are stored.

Latents are numbered layer by layer. `W_dec` has a block of `d_sae` rows for each pair of a layer and a target that it
writes: the first layer's blocks by target, then the second layer's, and so on. Targets before a layer take no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..contract import Batch, Parameters, StepInput
from ..parts.dense import squared, sum_of_rows
from ..parts.latents import Latents, above_threshold


class LayerInput(NamedTuple):
    """The tensors from which a layer's latents are computed."""

    x: Float[Tensor, "batch d_in"]
    x_compute: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "d_sae d_in"]
    W_enc_compute: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]


@dataclass(frozen=True)
class Layers:
    """The sizes: `n` layers, each with `d_sae` latents that read `d_in` channels, and targets of `d_out` channels."""

    n: int
    d_sae: int
    d_in: int
    d_out: int

    @property
    def n_pairs(self) -> int:
        """Return the number of pairs of a layer and a target that it writes."""
        return self.n * (self.n + 1) // 2

    def latents(self, layer: int) -> slice:
        """Return a layer's latents."""
        return slice(layer * self.d_sae, (layer + 1) * self.d_sae)

    def decoder(self, layer: int, target: int) -> slice:
        """Return the rows of `W_dec` with which a layer's latents write a target."""
        pair = layer * self.n - layer * (layer - 1) // 2 + target - layer
        return slice(pair * self.d_sae, (pair + 1) * self.d_sae)

    def decoders(self, W_dec: Float[Tensor, "rows d_out"], layer: int) -> Float[Tensor, "targets d_sae d_out"]:
        """Return a view of a layer's decoders, by target."""
        rows = slice(self.decoder(layer, layer).start, self.decoder(layer, self.n - 1).stop)
        return W_dec[rows].view(self.n - layer, self.d_sae, -1)

    def decoder_norms(self, W_dec: Float[Tensor, "rows d_out"]) -> Float[Tensor, " all_latents"]:
        """Return the norm of each latent's decoders for all its targets, concatenated."""
        return torch.cat([torch.linalg.vector_norm(self.decoders(W_dec, i), dim=(0, 2)) for i in range(self.n)])

    def scale_decoders(
        self, W_dec: Float[Tensor, "rows d_out"], factors: Float[Tensor, " all_latents"]
    ) -> Float[Tensor, "rows d_out"]:
        """Return `W_dec` with each latent's decoders times its factor."""
        parts = [self.decoders(W_dec, i) * factors[self.latents(i), None] for i in range(self.n)]
        return torch.cat([part.reshape(-1, self.d_out) for part in parts])

    def inputs(self, parameters: Parameters, batch: Batch, step: StepInput) -> list[LayerInput]:
        """Return each layer's input; rows are copied, because the sparse operations need them contiguous."""

        def split(rows: Tensor) -> list[Tensor]:
            return [part.contiguous() for part in rows.chunk(self.n, dim=1)]

        x = split(batch.x)
        x_compute = x if batch.x_compute is batch.x else split(batch.x_compute)
        weights = parameters["W_enc"], step.W_enc_compute, parameters["b_enc"]
        return [LayerInput(x[i], x_compute[i], *(w[self.latents(i)] for w in weights)) for i in range(self.n)]

    def errors(
        self,
        latents: Sequence[Latents],
        values: Sequence[Tensor],
        W_dec: Float[Tensor, "rows d_out"],
        b_dec: Float[Tensor, " all_d_out"],
        y: Float[Tensor, "batch all_d_out"],
    ) -> list[Float[Tensor, "batch d_out"]]:
        """Return, for each target, its reconstruction from the latents of all layers up to it, minus the target."""
        errors = []
        for target, (bias, part) in enumerate(zip(b_dec.chunk(self.n), y.chunk(self.n, dim=1), strict=True)):
            error = bias - part
            for layer in range(target + 1):
                error += latents[layer].decode(values[layer], W_dec[self.decoder(layer, target)])
            errors.append(error)
        return errors

    def grad_values(
        self,
        layer: int,
        latents: Latents,
        g: Sequence[Float[Tensor, "batch d_out"]],
        W_dec: Float[Tensor, "rows d_out"],
    ) -> Tensor:
        """Return the gradient with respect to a layer's latents from those with respect to the reconstructions, `g`."""
        total = latents.grad_values(g[layer], W_dec[self.decoder(layer, layer)])
        for target in range(layer + 1, self.n):
            total += latents.grad_values(g[target], W_dec[self.decoder(layer, target)])
        return total

    def gradients_of(
        self,
        parameters: Parameters,
        inputs: Sequence[LayerInput],
        latents: Sequence[Latents],
        g: Sequence[Float[Tensor, "batch d_out"]],
        values: Sequence[Tensor],
        by_pre_acts: Sequence[Tensor],
        scale: float = 1.0,
    ) -> Parameters:
        """Return the gradients of all parameters.

        `scale g` are the loss's gradients with respect to the reconstructions, and `by_pre_acts` those with respect to
        the pre-activations.
        """
        names = ("W_enc", "b_enc", "W_dec")
        gradients = {name: torch.empty_like(parameters[name]) for name in names}
        for layer, (one, some) in enumerate(zip(inputs, latents, strict=True)):
            rows = self.latents(layer)
            gradients["W_enc"][rows], gradients["b_enc"][rows] = some.grad_weights_and_bias(by_pre_acts[layer], one.x)
            scaled = values[layer] if scale == 1.0 else values[layer] * scale
            for target in range(layer, self.n):
                gradients["W_dec"][self.decoder(layer, target)] = some.grad_weights(scaled, g[target])
        gradients["b_dec"] = torch.cat([sum_of_rows(part) for part in g]) * scale
        return gradients


def squared_errors(errors: Sequence[Float[Tensor, "batch d_out"]]) -> Float[Tensor, ""]:
    """Return the sum of squares over all targets, in float64."""
    return torch.stack([squared(error) for error in errors]).sum()


def entries_above(one: LayerInput, step: StepInput, threshold: Float[Tensor, " d_sae"] | float = 0.0) -> Latents:
    """Return a layer's pre-activations above a threshold: sparse if they are few, otherwise all of them, dense."""
    # The capacity is for a whole step: several selections in one step would overwrite each other's certificates.
    own = replace(step, W_enc_compute=one.W_enc_compute, room=None)
    return above_threshold(own, {"W_enc": one.W_enc}, Batch(one.x, one.x_compute), one.b_enc, threshold)
