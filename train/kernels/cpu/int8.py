"""Products of int8 matrices with a known error bound, on a CPU.

Numbers are rounded with subtractive dither: a random fraction of a step is added before rounding and subtracted after.
Each error is then uniform within a step and independent of the other errors, whatever the numbers are (L. Schuchman,
IEEE Transactions on Communication Technology 12, 1964). The error of a product, a sum of such errors, therefore has
mean zero and a known standard deviation. Rounding to nearest has no such bound: all weights below half a step would be
rounded to zero. The dither is drawn once and is the same in every product.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from ....shared.core.compute.cores import by_blocks, joined

DEVIATIONS = 3.0
LEVELS = 126.5  # steps from zero to the largest magnitude: with dither, at most 127
_DIGITS = (127, 127, 1)  # what the last columns of inputs count for: sums up to 32,000, 10 standard deviations
_LATENTS = 256
_LINE = 64


@cache
def multiplies_int8() -> bool:
    """Return whether this CPU multiplies int8 twice as fast as bfloat16, as AVX-512 VNNI does; AMX was not measured."""
    has = {name: getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("vnni", "amx_tile")}
    return torch.backends.mkldnn.is_available() and has["vnni"] and not has["amx_tile"]


class Int8Encoder(NamedTuple):
    """Weights in int8, each latent's step and norm, and the effect of the inputs' dither on its pre-activations.

    The dither of a column is the same in all rows. The dither of inputs is subtracted per latent. The dither of weights
    is subtracted within the product: three additional columns hold its effect for a row of inputs, as 127 (a + b) + c.
    """

    q: Int8[Tensor, "d_sae d_in_plus_3"]
    steps: Float[Tensor, " d_sae"]
    norms: Float[Tensor, " d_sae"]
    offsets: Float[Tensor, " d_sae"]

    @classmethod
    def of(cls, W_enc: Float[Tensor, "d_sae d_in"], columns: Float[Tensor, " d_in"]) -> Int8Encoder:
        """Round `W_enc diag(columns)`."""
        d_in, digits = len(columns), torch.tensor(_DIGITS, dtype=torch.int8)
        width = d_in + len(digits)
        of_inputs, of_weights = _dither(d_in)
        # Rows are aligned to cache lines, which makes products 4% faster.
        q = torch.empty(len(W_enc), -(-width // _LINE) * _LINE, dtype=torch.int8)[:, :width]

        def round_rows(block: slice) -> tuple[Tensor, ...]:
            scaled = W_enc[block] * columns
            peaks, norms = peaks_and_norms(scaled)
            steps = peaks / LEVELS
            scaled.div_(steps[:, None]).add_(of_weights).floor_()
            q[block, :d_in], q[block, d_in:] = scaled, digits
            offsets = torch.mv(scaled.add_(0.5 - of_weights), 0.5 - of_inputs)
            return steps, norms, offsets.mul_(steps)

        return cls(q, *joined(by_blocks(round_rows, len(W_enc), _LATENTS)))

    def inputs(self, rows: Float[Tensor, "n d_in"]) -> Int8[Tensor, "n d_in_plus_3"]:
        """Round rows of inputs, given in units of their step; the rows are changed in place."""
        of_inputs, of_weights = _dither(rows.shape[1])
        whole = rows.add_(of_inputs).floor_()
        dither = torch.mv(whole, 0.5 - of_weights).round_()
        high = dither.div(127).round_()
        half = high.div(2).round_()
        digits = torch.stack([half, high - half, dither - 127 * high], 1)
        return torch.cat([whole, digits], 1).to(torch.int8)

    def scales(self, step: Float[Tensor, ""], norm: Float[Tensor, ""]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scale and offset that turn integer sums into products, and a bound on the products' error.

        Products are `sums * scale + offset`. The inputs have the given step and at most the given norm. The bound is
        `DEVIATIONS` standard deviations; it neglects products of two errors, which add less than 1% to the variance.
        """
        variance = ((step * self.norms).square_() + (norm * self.steps).square_()).div_(12)
        return self.steps * step, self.offsets * step, variance.sqrt_().mul_(DEVIATIONS)


def peaks_and_norms(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return each row's largest magnitude and its norm."""
    return peaks_of(rows), torch.linalg.vector_norm(rows, dim=1)


def peaks_of(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return each row's largest magnitude, clamped so that it is safe to divide by."""
    return torch.maximum(rows.amax(1), rows.amin(1).neg_()).clamp_min_(1e-30)


@cache
def _dither(d_in: int) -> Float[Tensor, "2 d_in"]:
    """Return the dither of inputs and of weights, by column."""
    return torch.rand(2, d_in, generator=torch.Generator().manual_seed(0))
