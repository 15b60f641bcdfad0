"""A whole TopK training step of fused kernels: no dense gradient, no [batch, d_sae], no wait for the host.

`TopKStep` owns the parameters, their moments and the bfloat16 shadows; one call is one step, and may be
captured in a CUDA graph: what changes between steps (learning rate, Adam's corrections, which latents are
dead) is read from the device. AuxK (arXiv 2406.04093, A.2) is dense over the dead latents alone, whose gradients
the update adds to those of the sparse entries.

Ranks that share the rows of a batch exchange their entries, with the rows of x and of the error, before the update,
which every rank then takes of the whole batch. Ranks that share the latents exchange candidates and partial
reconstructions, and update their own latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..across import Across
from ..auxk import auxk_of_rows
from ..entries import Selection, packed_positive, torch_topk
from ..fused_state import (
    AdamState,
    DenseGradients,
    DivergenceWatch,
    Hyperparameters,
    LatentCounters,
    StepMetrics,
    TopKOptions,
)
from .adam import update
from .csc import to_csc
from .select import select_topk
from .step_ends import begin_step, finish_step
from .token_major import Reconstruction, auxk_residual, decode, grad_values, reconstruct

_AUXK_ENTRIES = 1 << 26
"""AuxK's pre-activations that are held at a time."""
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


class TopKStep:
    """The state of one TopK SAE in training; `W_enc` and `W_dec` are `[d_sae, d_in]`.

    Products read copies of the weights in `compute_dtype`, which is that of the batches. Where gradients are
    clipped, `grad_norm` is the last step's. The parameters are of the latents that this rank trains.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        options: TopKOptions,
        compute_dtype: torch.dtype = torch.bfloat16,
        across: Across | None = None,
    ):
        self.options = options
        self.across = across or Across()
        self.W_enc = AdamState.of(parameters["W_enc"], compute_dtype)
        self.b_enc = AdamState.of(parameters["b_enc"], compute_dtype)
        self.W_dec = AdamState.of(parameters["W_dec"], compute_dtype)
        self.b_dec = AdamState.of(parameters["b_dec"], compute_dtype)
        self.grad_norm: Tensor | None = None
        device = self.W_enc.weight.device
        self.d_sae = len(self.W_enc.weight)
        self.tokens_since_fired = torch.zeros(self.d_sae, dtype=torch.int64, device=device)
        n_dead = torch.zeros((), dtype=torch.int32, device=device)
        self._counters = LatentCounters(self.tokens_since_fired, n_dead, options.dead_after_tokens)
        schedule = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
        self.hyperparameters = Hyperparameters(
            schedule, options.beta1, options.beta2, options.eps, options.decoder_lr_scale
        )
        self._betas = torch.tensor([options.beta1, options.beta2], dtype=torch.float64, device=device)
        self._steps = torch.zeros(len(_NAMES), device=device)
        self._lr: float | None = None
        self.steps: dict[str, Tensor] = dict(zip(_NAMES, self._steps.unbind(), strict=True))

    def parameters(self) -> dict[str, Tensor]:
        """Return the float32 parameters, which steps update in place."""
        return {name: state.weight for name, state in self._states().items()}

    def _states(self) -> dict[str, AdamState]:
        return {name: getattr(self, name) for name in _NAMES}

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return Adam's two moments by parameter, which steps update in place."""
        states = self._states().items()
        return {name: state.mean for name, state in states}, {name: state.square for name, state in states}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on, under the names that `SaeTrainer` uses in every mode."""
        state = {"tokens_since_fired": self.tokens_since_fired}
        for name, adam in self._states().items():
            state[f"parameters.{name}"] = adam.weight
            state[f"optimizer.exp_avg.{name}"] = adam.mean
            state[f"optimizer.exp_avg_sq.{name}"] = adam.square
            state[f"optimizer.step.{name}"] = self.steps[name]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.refresh()

    def refresh(self) -> None:
        """Update the copies of the weights that products read, after anything other than a step changed them."""
        for adam in self._states().values():
            adam.shadow.copy_(adam.weight)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the following steps, including captured ones."""
        if lr != self._lr:
            self.hyperparameters.schedule[0].fill_(lr)
            self._lr = lr

    def __call__(
        self, x: Float[Tensor, "batch d_in"], n_dead: int | None = None, watch: DivergenceWatch | None = None
    ) -> StepMetrics:
        """Take one step on this rank's rows, normalised; return the metrics of the whole batch.

        AuxK's selection is among as many latents as `n_dead`, which must not be fewer than are dead here, and is the
        same on all ranks: it costs as many columns of a product. With 0 there is no AuxK; None is all latents.
        """
        options, across, batch = self.options, self.across, self.across.rows(len(x))
        offsets = begin_step(self._steps, self._betas, self.hyperparameters.schedule, batch, options.k)
        bias = torch.addmv(self.b_enc.weight, self.W_enc.weight, self.b_dec.weight, alpha=-1)
        chosen = self._select(x, bias, offsets[: len(x) + 1])
        scale = 2 / (batch * options.total_variance)
        here = self._reconstruct(chosen, x, scale)
        # From here on, entries and rows are those of the whole batch.
        values, latents, by_pre_acts, squared_error, n_active, g, all_x = across.all_rows(
            chosen.values, chosen.indices, here.grad_pre_acts, here.squared_error, here.n_active, here.g, x
        )
        auxk_squared_error: Float[Tensor, ""] | None = None
        dense: DenseGradients | None = None
        n_dead = self.d_sae if n_dead is None else n_dead
        if n_dead and options.aux_coefficient > 0 and options.k_aux > 0:
            dead = self.tokens_since_fired >= options.dead_after_tokens
            auxk_squared_error, dense = self._auxk(x, here.g, scale, squared_error.sum(), bias, dead, n_dead)
        self.grad_norm = update(
            values,
            by_pre_acts,
            to_csc(latents, chosen.offsets if batch == len(x) else offsets, self.d_sae),
            all_x,
            g,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            self.hyperparameters,
            self._counters,
            options.max_norm,
            dense,
            across,
        )
        n_active, all_dead = across.over_latents(n_active), across.over_latents(self._counters.n_dead)
        return finish_step(
            squared_error,
            n_active,
            all_dead,
            options.total_variance,
            auxk_squared_error,
            options.aux_coefficient,
            watch,
        )

    def _select(
        self, x: Float[Tensor, "batch d_in"], bias: Float[Tensor, " d_sae"], offsets: Int64[Tensor, " batch_plus_1"]
    ) -> Selection:
        """Return the entries here that are among the k largest of their rows."""
        acts, indices = select_topk(x, self.W_enc.shadow, bias, min(self.options.k, self.d_sae))
        if not self.across.shares_latents:
            return Selection(acts.flatten(), indices.flatten(), offsets)
        return packed_positive(self.across.only_largest(acts, self.options.k), indices)

    def _reconstruct(self, chosen: Selection, x: Float[Tensor, "batch d_in"], scale: float) -> Reconstruction:
        """Return the error of the rows' reconstructions and its gradients; in one kernel if all latents are here."""
        W_dec, b_dec = self.W_dec.shadow, self.b_dec.weight
        if not self.across.shares_latents:
            return reconstruct(chosen.values, chosen.indices, W_dec, b_dec, x, scale)
        error = self.across.over_latents(decode(*chosen, W_dec)).add_(b_dec).sub_(x)
        squared_error = error.square().sum(1)
        g = error.mul_(scale)
        by_pre_acts = grad_values(g, W_dec, chosen.indices, chosen.offsets)
        return Reconstruction(squared_error, g, by_pre_acts, chosen.offsets.diff().int())

    def _auxk(
        self,
        x: Float[Tensor, "batch d_in"],
        g: Float[Tensor, "batch d_in"],
        scale: float,
        squared_error: Float[Tensor, ""],
        bias: Float[Tensor, " d_sae"],
        dead: Bool[Tensor, " d_sae"],
        n_dead: int,
    ) -> tuple[Float[Tensor, ""], DenseGradients]:
        """Return AuxK's squared error and its gradients; `g / scale` is `x_hat - x`, held constant.

        `x` and `g` are of this rank's rows, and `squared_error` is of the whole batch.
        """
        across, options = self.across, self.options

        def residual(e_hat: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            if across.shares_latents:
                e_hat = across.over_latents(e_hat.float())
            found, by_e_hat = auxk_residual(e_hat, g, scale, squared_error, options.aux_coefficient, x.dtype)
            return found.sum(), by_e_hat

        # The dead come first; those after them have no part in any sum.
        some = torch.argsort(dead.byte(), stable=True, descending=True)[:n_dead]
        bias = bias[some].where(dead[some], -torch.inf)
        W_enc, W_dec = self.W_enc.shadow[some], self.W_dec.shadow[some]
        totals: list[Tensor] = []
        n_rows = max(1, _AUXK_ENTRIES // n_dead)
        for x_part, g_part in zip(x.split(n_rows), g.split(n_rows), strict=True):
            sums = auxk_of_rows(
                x_part, g_part, W_enc, W_dec, bias, options.k_aux, torch_topk, residual, across.only_largest
            )
            sums = [one.float() for one in sums]
            totals = [total.add_(one) for total, one in zip(totals, sums, strict=True)] if totals else sums
        across.over_rows(*totals)
        auxk_squared_error, by_W_dec, by_W_enc, by_b_enc = totals
        slots = torch.full((self.d_sae,), -1, dtype=torch.int32, device=x.device)
        slots.scatter_(0, some, torch.arange(len(some), dtype=torch.int32, device=x.device))
        return auxk_squared_error, DenseGradients(slots, by_W_enc, by_W_dec, by_b_enc)
