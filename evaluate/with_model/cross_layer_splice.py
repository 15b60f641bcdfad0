"""Run the model with a cross-layer transcoder in place of all its MLPs at once: its replacement model.

As in "Circuit Tracing" (Anthropic, March 2025): when the forward pass reaches the hook point that a layer reads, that
layer's latents are computed from the modified model's activations. When it reaches the hook point that the layer
writes, the output is replaced by the sum of what the latents of this and all earlier layers write there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ...shared.core.errors import HookPointError
from ...shared.model.capture import reading, splice
from ...shared.model.hook_points import ResolvedHookPoint
from ...shared.sae import CrossLayerTranscoder
from ..metrics.encoding import rows_at_a_time

_Activation = Float[Tensor, "batch context d"]
Positions = tuple[Int64[Tensor, " positions"], Int64[Tensor, " positions"]]
"""Contexts of a batch and places within them, by which an activation is indexed."""


class _Written:
    """The sums of what latents have written so far in a forward pass, by target, at the usable positions."""

    def __init__(self, sae: CrossLayerTranscoder, usable: Positions):
        self.sae, self.usable = sae, usable
        self.layers_done = 0
        self.totals: dict[int, Tensor] = {}

    def read(self, layer: int, activation: _Activation) -> None:
        """Compute a layer's latents and add what they write to this and each later layer's target."""
        if layer == 0:
            self.layers_done, self.totals = 0, {}
        if layer != self.layers_done:
            raise self._out_of_order(self.sae.reads[layer])
        parts, skips = [], []
        for rows in activation[self.usable].float().split(rows_at_a_time(self.sae)):
            parts.append(self.sae.decode_layer(layer, self.sae.encode_layer(layer, rows)))
            skips.append(self.sae.skip_layer(layer, rows))
        for target, some in enumerate(zip(*parts, strict=True), start=layer):
            written = torch.cat(some)
            self.totals[target] = written + self.totals[target] if target in self.totals else written
        if skips and skips[0] is not None:
            self.totals[layer] = self.totals[layer] + torch.cat([skip for skip in skips if skip is not None])
        self.layers_done = layer + 1

    def write(self, target: int, activation: _Activation) -> _Activation:
        """Return the activation, with the usable positions replaced by what the latents wrote to this target."""
        if self.layers_done != target + 1:
            raise self._out_of_order(self.sae.writes[target])
        replaced = activation.clone()
        y_hat = self.totals.pop(target) + self.sae.get_parameter(f"b_dec_{target}")
        replaced[self.usable] = y_hat.to(activation.dtype)
        return replaced

    def _out_of_order(self, name: str) -> HookPointError:
        return HookPointError(
            f"the forward pass reached '{name}' after {self.layers_done} of the transcoder's layers had been read; "
            "expected `reads` and `writes` in the order of the model's layers, each layer read before it is written"
        )


@contextmanager
def replacing_all(
    model: PreTrainedModel,
    hook_points: Mapping[str, ResolvedHookPoint],
    sae: CrossLayerTranscoder,
    usable: Positions,
) -> Iterator[None]:
    """Within this context, replace all the transcoder's targets by its estimates at every usable position.

    Raises:
        HookPointError: the transcoder's layers are not in the order in which the model runs them.
    """
    written = _Written(sae, usable)

    def reader(layer: int):
        return lambda activation: written.read(layer, activation)

    def writer(target: int):
        return lambda activation: written.write(target, activation)

    with ExitStack() as stack:
        for layer, name in enumerate(sae.reads):
            stack.enter_context(reading(model, hook_points[name], reader(layer)))
        for target, name in enumerate(sae.writes):
            stack.enter_context(splice(model, hook_points[name], writer(target)))
        yield
