"""HierarchicalTopK: one SAE for every k up to K (arXiv 2505.24473)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from .contract import Batch, Number, Parameters, StepInput, StepOutput
from .parts.dense import error_of_nothing, product, squared
from .parts.latents import SparseLatents, scatter_add_rows
from .registry import register
from .topk import LargestConfig, TopK


class HierarchicalTopKConfig(LargestConfig, frozen=True, kw_only=True):
    """HierarchicalTopK: one SAE for every k up to K (arXiv 2505.24473)."""

    architecture: Literal["hierarchical_topk"] = "hierarchical_topk"


@register(HierarchicalTopKConfig)
class HierarchicalTopK(TopK[HierarchicalTopKConfig]):
    """TopK with the loss `(1 / K) sum_j ||x - x_hat_j||^2 / Var(x)` over every prefix of the sorted top K."""

    capturable = True

    def select(self, parameters: Parameters, batch: Batch, step: StepInput) -> SparseLatents:
        """Return the chosen entries, largest first in every row."""
        latents = super().select(parameters, batch, step)
        order = latents.pre_acts.view(len(batch.x), -1).argsort(dim=1, descending=True, stable=True)
        pre_acts, indices = (
            entries.view_as(order).gather(1, order).reshape(-1) for entries in (latents.pre_acts, latents.indices)
        )
        return replace(latents, pre_acts=pre_acts, indices=indices, csc=None)

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients; the gradient of latent j uses the sum of the residuals from j on."""
        x, latents, W_dec = batch.x, self.select(parameters, batch, step), parameters["W_dec"]
        values = latents.pre_acts.relu().view(len(x), -1)
        indices = latents.indices.view_as(values)
        k = values.shape[1]
        first = error_of_nothing(parameters, batch)
        residual_sum = torch.zeros_like(first)
        error, total = first, torch.zeros((), dtype=torch.float64, device=x.device)
        for j in range(k):
            error = error.addcmul(values[:, j : j + 1], W_dec[indices[:, j]])
            residual_sum += error
            total += squared(error)
        final = error
        scale = 2 / (len(x) * step.total_variance * k)
        by_bias = residual_sum * scale
        g = by_bias.clone()
        by_W_dec = torch.zeros_like(W_dec)
        by_values = torch.empty_like(values)
        error = first
        for j in range(k):
            directions = W_dec[indices[:, j]]
            by_values[:, j] = torch.linalg.vecdot(g, directions)
            scatter_add_rows(by_W_dec, indices[:, j], g * values[:, j : j + 1])
            error = error.addcmul(values[:, j : j + 1], directions)
            g = g - error * scale
        by_pre_acts = torch.where(values > 0, by_values, 0).view(-1)
        W_enc, b_enc = latents.grad_weights_and_bias(by_pre_acts, x)
        gradients = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": by_W_dec, "b_dec": by_bias.sum(0)}
        if self.centred:
            W_enc.addr_(b_enc, parameters["b_dec"], alpha=-1)
            gradients["b_dec"] -= parameters["W_enc"].T @ b_enc
        if "W_skip" in parameters:
            gradients["W_skip"] = product(by_bias.T, x)
        terms: dict[str, Number] = {"mse_loss": total / (len(x) * k * step.total_variance)}
        mse = squared(final) / len(x)
        return self.finish(parameters, batch, step, latents, gradients, final, terms, mse)
