"""The encoder as selections read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from ...shared.core.compute.cores import by_blocks

_LATENTS_AT_ONCE = 2048


@dataclass(frozen=True)
class Encoder:
    """`W_enc (x - b_dec) + b_enc`, and the copy of `W_enc` that products in the compute dtype read."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    W_enc_compute: Float[Tensor, "d_sae d_in"]

    @cached_property
    def bias(self) -> Float[Tensor, " d_sae"]:
        """The bias that makes the encoder `W_enc x + bias`."""
        return subtract_encoded(self.b_enc, self.W_enc, self.b_dec)


def subtract_encoded(
    bias: Float[Tensor, " d_sae"], W_enc: Float[Tensor, "d_sae d_in"], x: Float[Tensor, " d_in"]
) -> Float[Tensor, " d_sae"]:
    """Return `bias - W_enc x`."""
    if not W_enc.is_cpu:
        return bias - W_enc @ x
    out = bias.clone()
    by_blocks(lambda part: out[part].addmv_(W_enc[part], x, alpha=-1), len(W_enc), _LATENTS_AT_ONCE)
    return out
