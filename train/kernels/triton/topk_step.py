"""A whole TopK training step of fused kernels: no dense gradient, no [batch, d_sae], no wait for the host.

`TopKStep` owns the parameters, their moments and the bfloat16 shadows; one call is one step, and may be
captured in a CUDA graph: what changes between steps (learning rate, Adam's corrections, which latents are
dead) is read from the device. AuxK's entries (arXiv 2406.04093, A.2) join the main ones as `batch` more
rows, whose gradients are stacked under the main ones, so that one update serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .adam import AdamState, Hyperparameters, update
from .csc import to_csc
from .feature_major import sum_by_latent
from .select import select_topk, select_topk_dense
from .token_major import reconstruct

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class TopKOptions:
    """What a step does. Latents' values are those of the product, in the compute dtype, that chose them."""

    k: int
    total_variance: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    max_norm: float | None = None
    aux_coefficient: float = 0.0
    k_aux: int = 0
    dead_after_tokens: int = 10_000_000


class TopKStep:
    """The state of one TopK SAE in training; `W_enc` and `W_dec` are `[d_sae, d_in]`.

    Products read copies of the weights in `compute_dtype`, which is that of the batches. Where gradients are
    clipped, `grad_norm` is the last step's.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], options: TopKOptions, compute_dtype: torch.dtype = torch.bfloat16
    ):
        self.options = options
        self.W_enc = AdamState.of(parameters["W_enc"], compute_dtype)
        self.b_enc = AdamState.of(parameters["b_enc"], compute_dtype)
        self.W_dec = AdamState.of(parameters["W_dec"], compute_dtype)
        self.b_dec = AdamState.of(parameters["b_dec"], compute_dtype)
        self.grad_norm: Tensor | None = None
        device = self.W_enc.weight.device
        self.d_sae = len(self.W_enc.weight)
        self.tokens_since_fired = torch.zeros(self.d_sae, dtype=torch.int64, device=device)
        schedule = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
        self.hyperparameters = Hyperparameters(schedule, options.beta1, options.beta2, options.eps)
        self._betas = torch.tensor([options.beta1, options.beta2], dtype=torch.float64, device=device)
        self._steps = torch.zeros(len(_NAMES), device=device)
        self.steps: dict[str, Tensor] = dict(zip(_NAMES, self._steps.unbind(), strict=True))
        self._no_bias = torch.zeros_like(self.b_dec.weight)

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
        """Return all that a later step depends on, by the names that `SaeTrainer` gives it on any path."""
        state = {"tokens_since_fired": self.tokens_since_fired}
        for name, adam in self._states().items():
            state[f"parameters.{name}"] = adam.weight
            state[f"optimizer.exp_avg.{name}"] = adam.mean
            state[f"optimizer.exp_avg_sq.{name}"] = adam.square
            state[f"optimizer.step.{name}"] = self.steps[name]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a saved state."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.refresh()

    def refresh(self) -> None:
        """Copy the weights to where products read them, after something other than a step has changed them."""
        for adam in self._states().values():
            adam.shadow.copy_(adam.weight)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps that follow, captured ones included."""
        self.hyperparameters.schedule[0].fill_(lr)

    def __call__(self, x: Float[Tensor, "batch d_in"], n_dead: int | None = None) -> Float[Tensor, " 3"]:
        """Take one step on `x`, normalised; return [mse, l0, auxiliary loss] on the device.

        AuxK's selection is among as many latents as `n_dead`, which must not be fewer than are dead: it costs as many
        columns of a product. With 0 there is no AuxK; None is all latents.
        """
        options, batch = self.options, len(x)
        self._steps.add_(1)
        self.hyperparameters.schedule[1:3].copy_(1 - self._betas ** self.steps["W_enc"].double())
        bias = self.b_enc.weight - self.W_enc.weight @ self.b_dec.weight
        acts, indices = select_topk(x, self.W_enc.shadow, bias, options.k)
        offsets = torch.arange(0, batch * options.k + 1, options.k, device=x.device)
        values, latents = acts.flatten(), indices.flatten()
        values_fired = (values > 0).sum()
        fired = torch.zeros_like(self.b_enc.weight, dtype=torch.int32)
        fired.scatter_reduce_(0, latents.long(), (values > 0).int(), "amax")
        dead = self.tokens_since_fired >= options.dead_after_tokens
        self.tokens_since_fired.add_(batch).mul_(1 - fired)

        scale = torch.full((), 2 / (batch * options.total_variance), device=x.device)
        main = reconstruct(values, latents, offsets, self.W_dec.shadow, self.b_dec.weight, x, scale)
        g, grad_pre_acts = main.g, main.grad_pre_acts
        b_dec_grad = g.sum(0)
        aux_loss = scale.new_zeros(())
        n_dead = self.d_sae if n_dead is None else n_dead
        if n_dead and options.aux_coefficient > 0 and options.k_aux > 0:
            total = main.squared_error.sum()
            # The dead come first, by number, so that what comes after them changes no sum.
            some = torch.argsort((~dead).byte(), stable=True)[:n_dead]
            aux_bias = bias[some].where(dead[some], float("-inf"))
            k_aux = min(options.k_aux, n_dead)
            aux_acts, aux_places = select_topk_dense(x, self.W_enc.shadow[some], aux_bias, k_aux)
            aux_indices = some.int()[aux_places]
            aux_offsets = torch.arange(0, batch * k_aux + 1, k_aux, device=x.device)
            aux_scale = (2 * options.aux_coefficient / total).nan_to_num(0.0, 0.0, 0.0)
            aux_values, aux_latents = aux_acts.flatten(), aux_indices.flatten()
            aux = reconstruct(
                aux_values, aux_latents, aux_offsets, self.W_dec.shadow, self._no_bias, g / -scale, aux_scale
            )
            # The residual is the auxiliary loss's target, held constant; with no latent dead there is no loss.
            aux_loss = aux.squared_error.sum() * (aux_scale / 2) * dead.any()
            values, latents = torch.cat([values, aux_values]), torch.cat([latents, aux_latents])
            offsets = torch.cat([offsets, aux_offsets[1:] + len(main.grad_pre_acts)])
            g, grad_pre_acts = torch.cat([g, aux.g]), torch.cat([grad_pre_acts, aux.grad_pre_acts])

        csc = to_csc(latents, offsets, self.d_sae)
        b_dec_grad -= self.W_enc.weight.T @ sum_by_latent(grad_pre_acts, latents, offsets, self.d_sae, csc)
        self.grad_norm = update(
            values,
            grad_pre_acts,
            csc,
            x,
            g,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.hyperparameters,
            self.b_dec.weight,
            options.max_norm,
            b_dec_grad.square().sum(),
        )
        self._update_b_dec(b_dec_grad)
        mse = main.squared_error.sum() / batch
        return torch.stack([mse, values_fired / batch, aux_loss])

    def _update_b_dec(self, gradient: Float[Tensor, " d_in"]) -> None:
        """Apply Adam to `b_dec`, the only parameter that the update kernel leaves."""
        lr, correction1, correction2, clip = self.hyperparameters.schedule.unbind()
        gradient = gradient * clip
        self.b_dec.mean.lerp_(gradient, 1 - self.options.beta1)
        self.b_dec.square.mul_(self.options.beta2).addcmul_(gradient, gradient, value=1 - self.options.beta2)
        root = self.b_dec.square.sqrt() / correction2.sqrt() + self.options.eps
        self.b_dec.weight.sub_(lr / correction1 * self.b_dec.mean / root)
