"""Older names of `standard` that reads and writes other hook points: transcoders and crosscoders.

Transcoders: arXiv 2406.11944; skip transcoders: 2501.18823; crosscoders: Anthropic, October 2024.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeVar

from .registry import register
from .standard import L1Config, Standard


class TranscoderConfig(L1Config, frozen=True, kw_only=True):
    """Transcoder: from one place of the model to another (arXiv 2406.11944)."""

    architecture: Literal["transcoder"] = "transcoder"

    unused: ClassVar[tuple[str, ...]] = ()


class SkipTranscoderConfig(L1Config, frozen=True, kw_only=True):
    """Skip transcoder: a transcoder with a linear path beside the latents (arXiv 2501.18823)."""

    architecture: Literal["skip_transcoder"] = "skip_transcoder"

    unused: ClassVar[tuple[str, ...]] = ()
    always_skips: ClassVar[bool] = True


D = TypeVar("D", bound=L1Config)


@register(TranscoderConfig)
class Transcoder(Standard[D]):
    """`y_hat = ReLU(W_enc x + b_enc) W_dec + b_dec`, loss `||y - y_hat||^2 + lambda sum_i f_i ||W_dec_i||`.

    x is an MLP's input, y its output; `b_dec` starts at the mean of y.
    """

    capturable = True
    kind_of_wiring = "transcoder"


@register(SkipTranscoderConfig)
class SkipTranscoder(Transcoder[SkipTranscoderConfig]):
    """A transcoder with a linear path from x to y, `y_hat = f W_dec + b_dec + W_skip x`, that starts at zero."""

    capturable = True


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
