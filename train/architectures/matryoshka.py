"""Matryoshka BatchTopK: every prefix of the dictionary reconstructs (arXiv 2503.17547)."""

from __future__ import annotations

import torch

from ...shared.core.errors import ConfigError
from ..config import SaeConfig
from .batch_topk import BatchTopK
from .contract import Batch, Number, Parameters, StepInput, StepOutput
from .parts.dense import squared
from .parts.latents import gradients_of

_DEFAULT_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK with the loss `sum_g ||x - x_hat_g||^2 / Var(x)`, where x_hat_g uses the first g latents only.

    The prefix sizes are `prefix_sizes`, cumulative and ending at d_sae; by default d_sae / 16, / 8, / 4, / 2, d_sae.
    """

    name = "matryoshka_batch_topk"
    capturable = True
    options = ("prefix_sizes", *BatchTopK.options)
    resolved = (*BatchTopK.resolved, "prefixes")

    def __init__(self, config: SaeConfig, d_in: int):
        super().__init__(config, d_in)
        sizes = config.prefix_sizes or sorted({max(1, round(f * self.d_sae)) for f in _DEFAULT_FRACTIONS})
        self.prefixes = list(sizes)
        if self.prefixes != sorted(set(self.prefixes)) or self.prefixes[-1] != self.d_sae or self.prefixes[0] < 1:
            raise ConfigError(f"prefix_sizes is {self.prefixes}, expected to grow and end at d_sae = {self.d_sae}")

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients; a latent's is by the sum of the residuals that it is part of."""
        x, latents = batch.x, self.select(parameters, batch, step)
        groups = [latents.columns(*bounds)[0] for bounds in zip([0, *self.prefixes[:-1]], self.prefixes, strict=True)]
        rows = [slice(lo, hi) for lo, hi in zip([0, *self.prefixes[:-1]], self.prefixes, strict=True)]
        errors, error = [], parameters["b_dec"] - x
        for group, part in zip(groups, rows, strict=True):
            error = error + group.decode(group.pre_acts.relu(), parameters["W_dec"][part])
            errors.append(error)
        squares = [squared(error) / len(x) for error in errors]
        scale = 2 / (len(x) * step.total_variance)
        g = torch.zeros_like(x)
        parts: list[Parameters] = []
        by_bias = torch.zeros_like(parameters["b_dec"])
        for group, part, error in reversed(list(zip(groups, rows, errors, strict=True))):
            g = g + error * scale
            values = group.pre_acts.relu()
            own = {"W_enc": parameters["W_enc"][part], "b_dec": parameters["b_dec"]}
            by_pre_acts = torch.where(values > 0, group.grad_values(g, parameters["W_dec"][part]), 0)
            parts.insert(0, gradients_of(own, group, x, g, values, by_pre_acts))
            # Each part counts the bias once as the decoder's; only the first's, by all residuals, is that.
            by_bias += parts[0]["b_dec"] - g.sum(0)
        gradients = {name: torch.cat([part[name] for part in parts]) for name in ("W_enc", "b_enc", "W_dec")}
        gradients["b_dec"] = by_bias + g.sum(0)
        terms: dict[str, Number] = {"mse_loss": sum(squares) / step.total_variance}
        return self.finish(parameters, batch, step, latents, gradients, errors[-1], terms, squares[-1])
