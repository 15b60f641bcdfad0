"""Which next tokens a latent promotes and suppresses: its decoder row through the final norm and the unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_RESIDUAL = ("attn_z", "mlp_in")
"""Kinds of hook point whose directions the unembedding does not read, though they may be as wide."""

FINAL_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "ln_out")


@dataclass(frozen=True)
class LogitEffects:
    """The tokens of largest and smallest logit effect of each latent, and how far the largest stands out.

    Effects are centred over the vocabulary, since a constant changes no prediction. `peak` is the
    largest effect in standard deviations.
    """

    promoted: Int64[np.ndarray, "d_sae n"]
    promoted_effect: Float[np.ndarray, "d_sae n"]
    suppressed: Int64[np.ndarray, "d_sae n"]
    suppressed_effect: Float[np.ndarray, "d_sae n"]
    peak: Float[np.ndarray, " d_sae"]


@torch.inference_mode()
def logit_effects(
    model: PreTrainedModel, W_dec: Float[Tensor, "d_sae d_model"], target: str, n: int = 10, step: int = 512
) -> LogitEffects | None:
    """Return every latent's logit effects, or None where decoder rows are no directions of the residual stream.

    `target` is the hook point that the decoder reconstructs, by its canonical name.
    """
    unembedding = model.get_output_embeddings()
    if target.rpartition(".")[2] in NOT_RESIDUAL:
        return None
    if unembedding is None or unembedding.weight.shape[1] != W_dec.shape[1]:
        return None
    norm = final_norm(model)
    weight = unembedding.weight.float()
    n = min(n, len(weight))
    parts: list[tuple[Tensor, ...]] = []
    for rows in W_dec.split(step):
        effects = _through(norm, rows.to(weight.device)) @ weight.T
        effects -= effects.mean(dim=1, keepdim=True)
        high, low = effects.topk(n), effects.topk(n, largest=False)
        deviation = effects.std(dim=1, correction=0).clamp_min(1e-12)
        parts.append((high.indices, high.values, low.indices, low.values, high.values[:, 0] / deviation))
    return LogitEffects(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _through(norm: nn.Module | None, rows: Tensor) -> Tensor:
    """Apply the norm without its bias, whatever its kind."""
    if norm is None:
        return rows.float()
    dtype = next((parameter.dtype for parameter in norm.parameters()), torch.float32)
    rows = rows.to(dtype)
    return norm(rows).float() - norm(torch.zeros_like(rows[:1])).float()


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm between the last block and the unembedding, or None where there is none."""
    for part in model.base_model.modules():
        if any(isinstance(child, nn.ModuleList) for child in part.children()):
            children = dict(part.named_children())
            return next((children[name] for name in FINAL_NORMS if name in children), None)
    return None
