"""Adam with the decoder held at unit norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .architectures.base import Architecture, Parameters


class Optimizer:
    """Fused Adam over an SAE's parameters.

    Where the architecture has a unit-norm decoder, the gradient parallel to each decoder row is
    removed before the step and the rows are normalised after it (arXiv 2406.04093, A.1).
    """

    def __init__(self, parameters: Parameters, architecture: Architecture, clip_grad_norm: float | None = None):
        self.parameters = parameters
        self.unit_norm_decoder = architecture.unit_norm_decoder
        self.betas = architecture.betas
        self.eps = architecture.eps
        self.clip_grad_norm = clip_grad_norm
        self.exp_avg = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.steps = {name: torch.zeros((), device=tensor.device) for name, tensor in parameters.items()}

    def step(self, gradients: Parameters, lr: float) -> float | None:
        """Change the parameters in place; return the gradient's norm where it is clipped."""
        W_dec = self.parameters["W_dec"]
        if self.unit_norm_decoder:
            parallel = torch.linalg.vecdot(gradients["W_dec"], W_dec)
            gradients["W_dec"].addcmul_(parallel[:, None], W_dec, value=-1)
        norm = self._clip(gradients) if self.clip_grad_norm else None
        torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.parameters.values()),
            [gradients[name] for name in self.parameters],
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            [],
            list(self.steps_next()),
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
        if self.unit_norm_decoder:
            W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min_(1e-8)
        return norm

    def steps_next(self) -> list[Tensor]:
        """Count one more step and return the counters, which fused Adam takes as tensors."""
        for count in self.steps.values():
            count += 1
        return list(self.steps.values())

    def _clip(self, gradients: Parameters) -> float:
        assert self.clip_grad_norm is not None
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        factor = torch.clamp(self.clip_grad_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients.values():
            gradient *= factor
        return float(norm)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments and step counts."""
        groups = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the moments and step counts."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
