"""Fit what a block adds to the residual stream, and find the setting of the model that explains a scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference of two tensors that are the same, as a share of their norm: rounding alone stays well below."""
_SCALE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-3}
_SCALES = ("multiplier", "scale", "scaling", "alpha", "beta", "factor", "depth", "residual")
"""What a setting's name contains for it to be taken as a scale."""


class Fit(NamedTuple):
    """A tensor as a sum of others times scales, with what is left as a share of the sum's norm."""

    scales: tuple[float, ...]
    left: float


def fit(target: Tensor, parts: Sequence[Tensor]) -> Fit:
    """Fit `target = scale_1 part_1 + ...` by least squares in float64; nothing fits NaN or infinity."""
    if not all(bool(tensor.isfinite().all()) for tensor in (target, *parts)):
        return Fit((0.0,) * len(parts), math.inf)
    columns = torch.stack([part.flatten().double().cpu() for part in parts], dim=1)
    wanted = target.flatten().double().cpu()[:, None]
    scales = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution
    explained = columns @ scales
    left = float((wanted - explained).norm() / explained.norm().clamp_min(1e-30))
    return Fit(tuple(scales[:, 0].tolist()), left)


def tolerance(*tensors: Tensor) -> float:
    """Return the difference that the coarsest of the tensors' types rounds away."""
    return max(TOLERANCE.get(tensor.dtype, 1e-4) for tensor in tensors)


def same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors differ by rounding alone; NaN is the same as NaN."""
    if a.shape != b.shape:
        return False
    wide_a, wide_b = (x.double().nan_to_num(0, 0, 0) for x in (a, b))
    return bool((wide_a - wide_b).norm() <= tolerance(a, b) * wide_b.norm())


def explain_scale(
    scale: float, dtype: torch.dtype, config: Any, modules: Sequence[nn.Module]
) -> tuple[float, str] | None:
    """Return the exact value of a measured scale and the setting that it is, or None where no setting is near."""
    near = _SCALE_TOLERANCE.get(dtype, 1e-5)
    if abs(scale - 1) <= near:
        return 1.0, ""
    for name, value in _settings(config, modules):
        if abs(value - scale) <= near * abs(scale):
            return value, name
    return None


def _settings(config: Any, modules: Sequence[nn.Module]) -> Iterator[tuple[str, float]]:
    """Yield the numbers among a configuration's and modules' attributes, then what models make of them."""
    layers = getattr(config, "num_hidden_layers", None)
    numbers = {
        name: float(value)
        for owner in (config, *modules)
        for name, value in vars(owner).items()
        if any(part in name for part in _SCALES)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value > 0
    }
    yield from numbers.items()
    for name, value in numbers.items():
        yield f"1 / {name}", 1 / value
        if isinstance(layers, int):
            yield f"{name} / sqrt(num_hidden_layers)", value / math.sqrt(layers)
