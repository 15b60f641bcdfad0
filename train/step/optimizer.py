"""Adam, or AdamW, with the decoder held at unit norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...shared.core.compute.cores import on_cores
from ..architectures.base import Architecture
from ..architectures.contract import SINGLE_PROCESS, Collectives, Parameters
from ..kernels.gradient import Gradient, whole

_BLOCK_ELEMENTS = 1 << 18


class Optimizer:
    """Fused Adam over an SAE's parameters; with `weight_decay`, AdamW (arXiv 1711.05101) over its matrices.

    Biases and thresholds are not decayed, because zero is the mean of the inputs and not a preferred threshold.

    If the architecture has a unit-norm decoder, the gradient parallel to each decoder row is removed before the step,
    and the rows are normalised after it (arXiv 2406.04093, A.1). Frozen parameters stay as they are. `copies` are
    copies of parameters in the compute dtype, and are updated after every step.
    """

    def __init__(
        self,
        parameters: Parameters,
        architecture: Architecture,
        clip_grad_norm: float | None = None,
        across: Collectives = SINGLE_PROCESS,
    ):
        self.parameters = parameters
        self.unit_norm_decoder = architecture.unit_norm_decoder
        self.betas = architecture.adam_betas
        self.eps = architecture.eps
        self.lr_scales = architecture.lr_scales
        self.undecayed = architecture.undecayed
        self.frozen = architecture.frozen
        self.weight_decay = architecture.config.weight_decay
        self.clip_grad_norm = clip_grad_norm
        self.across = across
        self.copies: Parameters = {}
        self.exp_avg = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.steps = {name: torch.zeros((), device=tensor.device) for name, tensor in parameters.items()}

    def step(
        self,
        gradients: Mapping[str, Gradient],
        lr: float | Tensor,
        skip: Tensor | None = None,
        undecayed_lr: float | Tensor | None = None,
    ) -> Tensor | None:
        """Update the parameters in place; return the gradient's norm if it is clipped.

        If `skip`, on the device, is 1, nothing changes. `undecayed_lr` is that of the parameters in `undecayed`.

        Large matrices are updated one block of rows at a time. On a CPU, a block then stays in cache from its gradient,
        which may be computed only then, to its normalisation and its copy in `copies`.
        """
        norm = None
        gradients = {name: gradient for name, gradient in gradients.items() if name not in self.frozen}
        if self.clip_grad_norm:
            tensors = {name: whole(gradient) for name, gradient in gradients.items()}
            for rows in self._row_blocks("W_dec") if "W_dec" in tensors else ():
                self._project(tensors["W_dec"][rows], rows)
            norm = self._clip(tensors)
            gradients = tensors
        for steps in self.steps.values():
            steps += 1 if skip is None else 1 - skip

        def step_block(block: tuple[str, slice]) -> None:
            rate = lr if undecayed_lr is None or block[0] not in self.undecayed else undecayed_lr
            self._step_block(*block, gradients, rate, skip)

        # On a GPU, launches stay in this thread, which has the batch's device and stream and may be capturing.
        run = on_cores if self.parameters["W_dec"].is_cpu else map
        list(run(step_block, [(name, rows) for name in gradients for rows in self._row_blocks(name)]))
        return norm

    def _step_block(
        self, name: str, rows: slice, gradients: Mapping[str, Gradient], lr: float | Tensor, skip: Tensor | None
    ) -> None:
        unit_norm = name == "W_dec" and self.unit_norm_decoder
        gradient = gradients[name][rows]
        if unit_norm and not self.clip_grad_norm:
            self._project(gradient, rows)
        self._adam(name, rows, gradient, lr, skip)
        changed = self.parameters[name][rows]
        if unit_norm:
            changed /= changed.norm(dim=1, keepdim=True).clamp_min_(1e-8)
        if name in self.copies:
            self.copies[name][rows].copy_(changed)

    def copy(self) -> None:
        """Update the copies after something other than a step has changed the parameters."""
        for name, copy in self.copies.items():
            copy.copy_(self.parameters[name])

    def _row_blocks(self, name: str) -> list[slice]:
        tensor = self.parameters[name]
        if tensor.is_cuda:
            return [slice(None)]
        rows = max(1, _BLOCK_ELEMENTS * max(len(tensor), 1) // max(tensor.numel(), 1))
        return [slice(start, start + rows) for start in range(0, len(tensor), rows)]

    def _project(self, gradient: Tensor, rows: slice) -> None:
        if self.unit_norm_decoder:
            directions = self.parameters["W_dec"][rows]
            gradient.addcmul_(torch.linalg.vecdot(gradient, directions)[:, None], directions, value=-1)

    def _adam(self, name: str, rows: slice, gradient: Tensor, lr: float | Tensor, skip: Tensor | None) -> None:
        if name in self.lr_scales:
            lr = lr * self.lr_scales[name]
        decay = self.weight_decay if self.parameters[name].dim() > 1 else 0.0
        fused = torch._fused_adamw_ if decay else torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]
        fused(
            [self.parameters[name][rows]],
            [gradient],
            [self.exp_avg[name][rows]],
            [self.exp_avg_sq[name][rows]],
            [],
            [self.steps[name]],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )

    def _clip(self, gradients: Parameters) -> Tensor:
        assert self.clip_grad_norm is not None
        norm = self.across.gradient_norm(gradients)
        factor = torch.clamp(self.clip_grad_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients.values():
            gradient *= factor
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments and step counts."""
        groups = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the moments and step counts."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
