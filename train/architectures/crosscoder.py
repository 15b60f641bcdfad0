"""Crosscoders by their older name: `standard` that reads and writes several hook points (Anthropic, October 2024)."""

from __future__ import annotations

from typing import Literal

from .registry import register
from .standard import L1Config, Standard


class CrosscoderConfig(L1Config, frozen=True, kw_only=True):
    """Crosscoder: one set of latents for several hook points (Anthropic, October 2024)."""

    architecture: Literal["crosscoder"] = "crosscoder"


@register(CrosscoderConfig)
class Crosscoder(Standard[CrosscoderConfig]):
    """`f = ReLU(sum_l W_enc_l x_l + b_enc)`, loss `sum_l ||x_l - x_hat_l||^2 + lambda sum_i f_i sum_l ||W_dec_l_i||`.

    Its rows are those of its hook points, of equal width, one after the other.
    """

    capturable = True
    kind_of_wiring = "crosscoder"
