"""Compute which tokens a latent promotes and suppresses: its decoder row through the final norm and unembedding."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .readout import NoReadoutError, Readout, find_readout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESIDUAL = re.compile(r"blocks\.\d+\.(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
"""Hook points whose directions are directions of the residual stream. Others have no direct effect on the logits."""


@dataclass(frozen=True)
class LogitEffects:
    """The tokens with the largest and smallest logit effects of each latent.

    Effects are centred over the vocabulary, because adding a constant to all logits changes no prediction. `peak` is
    the largest effect in standard deviations.
    """

    promoted: Int64[np.ndarray, "d_sae n"]
    promoted_effect: Float[np.ndarray, "d_sae n"]
    suppressed: Int64[np.ndarray, "d_sae n"]
    suppressed_effect: Float[np.ndarray, "d_sae n"]
    peak: Float[np.ndarray, " d_sae"]


def readout_of(model: PreTrainedModel) -> Readout | str:
    """Return how the model turns its residual stream into logits, or the reason why it cannot be determined."""
    try:
        return find_readout(model)
    except NoReadoutError as error:
        return str(error)


def why_no_effects(readout: Readout | str, d: int, target: str) -> str | None:
    """Return why decoder rows of width `d` at hook point `target` have no logit effects; None if they have some."""
    if isinstance(readout, str):
        return readout
    if RESIDUAL.fullmatch(target) is None and not _is_block(target, readout.blocks):
        return f"the decoder rows at '{target}' are not directions of the residual stream"
    if readout.d_model != d:
        return f"the decoder rows at '{target}' are {d} wide and the residual stream {readout.d_model}"
    return None


def _is_block(path: str, blocks: str) -> bool:
    """Return whether a module path, with or without the base model's prefix, is the path of a block."""
    parent, _, number = path.rpartition(".")
    return number.isdecimal() and (parent == blocks or blocks.endswith(f".{parent}"))


def logit_effects(
    model: PreTrainedModel,
    W_dec: Float[Tensor, "d_sae d_model"],
    target: str,
    n: int = 10,
    step: int = 512,
    vocabulary: Iterable[int] | None = None,
) -> LogitEffects | None:
    """Return every latent's logit effects, or None if `why_no_effects` returns a reason.

    `target` is the canonical name of the hook point that the decoder reconstructs. `vocabulary` lists the token ids,
    which excludes padding rows of the unembedding; by default every row counts as a token.
    """
    readout = readout_of(model)
    if isinstance(readout, str) or why_no_effects(readout, W_dec.shape[1], target) is not None:
        return None
    return effects_through(readout, W_dec, n, step, vocabulary)


@torch.inference_mode()
def effects_through(
    readout: Readout,
    W_dec: Float[Tensor, "d_sae d_model"],
    n: int = 10,
    step: int = 512,
    vocabulary: Iterable[int] | None = None,
) -> LogitEffects:
    """Return the logit effects of decoder rows, in logits, centred over the vocabulary."""
    weight = readout.weight.float()
    rows_of = _tokens(vocabulary, len(weight)).to(weight.device)
    if len(rows_of) < len(weight):
        weight = weight[rows_of]
    n = min(n, len(weight))
    parts: list[tuple[Tensor, ...]] = []
    for rows in W_dec.split(step):
        effects = readout.directions(rows.to(weight.device)) @ weight.T
        effects -= effects.mean(dim=1, keepdim=True)
        high, low = effects.topk(n), effects.topk(n, largest=False)
        deviation = effects.std(dim=1, correction=0).clamp_min(1e-12)
        peak = high.values[:, 0] / deviation
        parts.append((rows_of[high.indices], high.values, rows_of[low.indices], low.values, peak))
    return LogitEffects(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _tokens(vocabulary: Iterable[int] | None, n_rows: int) -> Int64[Tensor, " tokens"]:
    """Return which rows of the unembedding are tokens."""
    if vocabulary is None:
        return torch.arange(n_rows)
    return torch.tensor(sorted({token for token in vocabulary if 0 <= token < n_rows}), dtype=torch.int64)
