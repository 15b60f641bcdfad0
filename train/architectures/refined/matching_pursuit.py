"""Matching pursuit: one latent after another, each the one that says most of what is left (arXiv 2506.03093).

The decoder is the encoder, too. With `r_0 = x - b_dec`, step t chooses the latent whose direction has the largest
product with the residual `r_t`, and

    v_t = ReLU(r_t . w),    r_{t+1} = r_t - v_t w

Gradients go through the chosen products, not through the choice: with `g_{t+1}` the loss's gradient with respect to
`r_{t+1}`, that with respect to `w` is `-(v_t g_{t+1} + (g_{t+1} . w) r_t)` and `g_t = g_{t+1} - (g_{t+1} . w) w` where
`v_t > 0`. Residuals are computed again on the way back, so that both ways cost O(batch k d_in) beside the choice.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from msgspec import Meta
from torch import Tensor

from ....shared.core.compute.cores import even_blocks
from ....shared.core.errors import SaeError
from ....shared.sae import Sae
from ...stream.normalization import Normalization
from ..base import Architecture
from ..contract import Batch, Buffers, Parameters, StepInput, StepOutput
from ..parts.decoder_norms import are_unit_norms
from ..parts.dense import squared, sum_of_rows
from ..parts.latents import scatter_add_rows
from ..registry import register
from ..topk import CountConfig

_ROW_BLOCK = 1024
_WIDEST_GRAM = 8192


class MatchingPursuitConfig(CountConfig, frozen=True, kw_only=True):
    """Matching pursuit: latents are chosen one after another, by the decoder (arXiv 2506.03093)."""

    architecture: Literal["matching_pursuit"] = "matching_pursuit"
    k: Annotated[int, Meta(ge=1, description="Steps per row; a latent may be chosen more than once.")]


class Pursuit(NamedTuple):
    """What each step chose for each row, what it was multiplied by, and what all of them leave of the rows."""

    chosen: Int64[Tensor, "batch k"]
    values: Float[Tensor, "batch k"]
    residual: Float[Tensor, "batch d_in"]


def pursue(rows: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_sae d_in"], k: int) -> Pursuit:
    """Return the choices of k steps of matching pursuit.

    Products with the residual follow from those with the row and among directions, where the matrix of the latter is
    smaller than k products of the batch; otherwise they are computed anew at each step. Values are always those of the
    residual itself.
    """
    n, d_sae = len(rows), len(W_dec)
    gram = W_dec @ W_dec.T if d_sae <= min(_WIDEST_GRAM, n * k // 2) else None
    chosen, values, left = torch.empty(n, k, dtype=torch.long, device=rows.device), rows.new_empty(n, k), rows.clone()
    for start, stop in ((block.start, block.stop) for block in even_blocks(n, _ROW_BLOCK)):
        residual = left[start:stop]
        products = residual @ W_dec.T
        for step in range(k):
            best = products.argmax(dim=1)
            w = W_dec[best]
            value = (residual * w).sum(dim=1).relu()
            residual.addcmul_(value[:, None], w, value=-1)
            chosen[start:stop, step], values[start:stop, step] = best, value
            if step + 1 == k:
                break
            if gram is None:
                products = residual @ W_dec.T
            else:
                products.addcmul_(value[:, None], gram[best], value=-1)
    return Pursuit(chosen, values, left)


@register(MatchingPursuitConfig)
class MatchingPursuit(Architecture[MatchingPursuitConfig]):
    """Loss `||r_k||^2 / Var(x)`, the error of the reconstruction; decoder rows have unit norm.

    Saved as SAELens's kind of the same name, which ends after k steps and for no other reason.
    """

    saved_as = "matching_pursuit"

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return random decoder rows of unit norm, and a bias of zero; there is no encoder."""
        found = super().initial_parameters(generator)
        return {name: found[name] for name in ("W_dec", "b_dec")}

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        chosen, values, residual = pursue(x - parameters["b_dec"], W_dec, self.config.k)
        mse = squared(residual) / len(x)
        g = residual * (2 / (len(x) * step.total_variance))
        by_W_dec = torch.zeros_like(W_dec)
        for t in reversed(range(self.config.k)):
            w, value = W_dec[chosen[:, t]], values[:, t, None]
            along = torch.where(value > 0, (g * w).sum(dim=1, keepdim=True), 0)
            residual = torch.addcmul(residual, value, w)
            scatter_add_rows(by_W_dec, chosen[:, t], -(value * g + along * residual))
            g = g - along * w
        fired = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=x.device)
        fired.index_fill_(0, chosen.where(values > 0, self.d_sae).flatten(), True)
        loss = mse / step.total_variance
        return StepOutput(
            gradients={"W_dec": by_W_dec, "b_dec": -sum_of_rows(g)},
            fired=fired[: self.d_sae],
            loss=loss,
            mse=mse,
            l0=n_different(chosen.where(values > 0, -1)) / len(x),
            terms={"mse_loss": loss},
        )

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return the saved SAE's tensors, in raw activation units; pursuit scales with its rows."""
        b_dec = parameters["b_dec"] / normalization.scale + normalization.mean.to(parameters["b_dec"].dtype)
        return {"W_dec": parameters["W_dec"], "b_dec": b_dec}

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters with which training starts from an SAE."""
        b_dec = (sae.b_dec.detach() - normalization.mean) * normalization.scale
        return {"W_dec": sae.W_dec.detach(), "b_dec": b_dec}, self.initial_buffers()

    def check_source(self, sae: Sae) -> None:
        """Also refuse an SAE whose decoder norms are not one, because they decide which latents fire."""
        super().check_source(sae)
        norms = sae.W_dec.detach().norm(dim=1)
        if not are_unit_norms(norms):
            raise SaeError(
                f"its decoder norms are {float(norms.min()):.3g} to {float(norms.max()):.3g}, and training holds them "
                "at 1, which would choose other latents; train from random directions"
            )

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report another end of a row's pursuit."""
        found = super().differences(sae, normalization)
        ends = {name: sae.config[name] for name in self.ends}
        if ends != self.ends:
            found.append(f"a row ended with {ends}, now with {self.ends}")
        return found

    @property
    def ends(self) -> dict[str, Any]:
        """When a row's pursuit ends, as it is saved."""
        return {"residual_threshold": 0.0, "max_iterations": self.config.k, "stop_on_duplicate_support": False}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe("k", **self.ends)


def n_different(latents: Int64[Tensor, "batch k"]) -> Float[Tensor, ""]:
    """Return the number of different latents per row, summed over rows; -1 is none."""
    ordered = latents.sort(dim=1).values
    first = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    return torch.count_nonzero(first & (ordered >= 0)).double()
