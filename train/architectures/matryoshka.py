"""Matryoshka BatchTopK: every prefix of the dictionary reconstructs (arXiv 2503.17547)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from msgspec import Meta

from ...shared.core.errors import ConfigError
from .batch_topk import BatchTopK
from .contract import Batch, Number, Parameters, StepInput, StepOutput
from .parts.dense import error_of_nothing, product, squared
from .parts.latents import gradients_of
from .registry import register
from .topk import LargestConfig

_DEFAULT_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class MatryoshkaBatchTopKConfig(LargestConfig, frozen=True, kw_only=True):
    """Matryoshka BatchTopK: every prefix of the latents reconstructs (arXiv 2503.17547)."""

    architecture: Literal["matryoshka_batch_topk"] = "matryoshka_batch_topk"
    prefix_sizes: Annotated[
        tuple[int, ...] | None,
        Meta(description="Sizes of the prefixes, growing to d_sae; d_sae / 16, / 8, / 4, / 2 and d_sae if not given."),
    ] = None

    def __post_init__(self) -> None:
        """Check that the prefixes grow and end with all latents."""
        super().__post_init__()
        sizes = self.prefixes
        if sizes != sorted(set(sizes)) or sizes[-1] != self.d_sae or sizes[0] < 1:
            raise ConfigError(f"prefix_sizes is {sizes}, expected to grow and end at d_sae = {self.d_sae}")

    @property
    def prefixes(self) -> list[int]:
        """The sizes of the prefixes."""
        if self.prefix_sizes is not None:
            return list(self.prefix_sizes)
        return sorted({max(1, round(fraction * self.d_sae)) for fraction in _DEFAULT_FRACTIONS})


@register(MatryoshkaBatchTopKConfig)
class MatryoshkaBatchTopK(BatchTopK[MatryoshkaBatchTopKConfig]):
    """BatchTopK with the loss `sum_g ||x - x_hat_g||^2 / Var(x)`, where x_hat_g uses the first g latents only."""

    capturable = True
    resolved = (*BatchTopK.resolved, "prefixes")

    @property
    def prefixes(self) -> list[int]:
        """The sizes of the prefixes, cumulative."""
        return self.config.prefixes

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients; a latent's gradient uses the sum of the residuals that it is part of."""
        x, latents = batch.x, self.select(parameters, batch, step)
        groups = [latents.columns(*bounds)[0] for bounds in zip([0, *self.prefixes[:-1]], self.prefixes, strict=True)]
        rows = [slice(lo, hi) for lo, hi in zip([0, *self.prefixes[:-1]], self.prefixes, strict=True)]
        errors, error = [], error_of_nothing(parameters, batch)
        for group, part in zip(groups, rows, strict=True):
            error = error + group.decode(group.pre_acts.relu(), parameters["W_dec"][part])
            errors.append(error)
        squares = [squared(error) / len(x) for error in errors]
        scale = 2 / (len(x) * step.total_variance)
        g = torch.zeros_like(error)
        parts: list[Parameters] = []
        by_bias = torch.zeros_like(parameters["b_dec"])
        for group, part, error in reversed(list(zip(groups, rows, errors, strict=True))):
            g = g + error * scale
            values = group.pre_acts.relu()
            own = {"W_enc": parameters["W_enc"][part], "b_dec": parameters["b_dec"]}
            by_pre_acts = torch.where(values > 0, group.grad_values(g, parameters["W_dec"][part]), 0)
            parts.insert(0, gradients_of(own, group, x, g, values, by_pre_acts, self.centred))
            # Each part includes the decoder's term g.sum(0), which counts only once: below, from all residuals.
            if self.centred:
                by_bias += parts[0]["b_dec"] - g.sum(0)
        gradients = {name: torch.cat([part[name] for part in parts]) for name in ("W_enc", "b_enc", "W_dec")}
        gradients["b_dec"] = by_bias + g.sum(0)
        if "W_skip" in parameters:
            gradients["W_skip"] = product(g.T, x)
        terms: dict[str, Number] = {"mse_loss": sum(squares) / step.total_variance}
        return self.finish(parameters, batch, step, latents, gradients, errors[-1], terms, squares[-1])
