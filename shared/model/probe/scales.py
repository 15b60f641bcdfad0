"""Fit the scales at which a block adds its parts to the stream, and find the model's setting that explains a scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference between equal tensors, relative to their norm. Rounding errors stay well below it."""
_SCALE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-3}
_SCALES = ("multiplier", "scale", "scaling", "alpha", "beta", "factor", "depth", "residual")
"""A setting whose name contains one of these is a possible scale."""


class Fit(NamedTuple):
    """A tensor fitted as a weighted sum of others; `residual` is the norm of the rest relative to that of the sum."""

    scales: tuple[float, ...]
    residual: float


def fit(target: Tensor, parts: Sequence[Tensor]) -> Fit:
    """Fit `target = scale_1 part_1 + ...` by least squares in float64; NaN or infinity gives an infinite residual."""
    if not all(bool(tensor.isfinite().all()) for tensor in (target, *parts)):
        return Fit((0.0,) * len(parts), math.inf)
    columns = torch.stack([part.flatten().double().cpu() for part in parts], dim=1)
    wanted = target.flatten().double().cpu()[:, None]
    scales = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution
    explained = columns @ scales
    residual = float((wanted - explained).norm() / explained.norm().clamp_min(1e-30))
    return Fit(tuple(scales[:, 0].tolist()), residual)


def tolerance(*tensors: Tensor) -> float:
    """Return the tolerance of the least precise of the tensors' data types."""
    return max(TOLERANCE.get(tensor.dtype, 1e-4) for tensor in tensors)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding; NaN equals NaN."""
    if a.shape != b.shape:
        return False
    wide_a, wide_b = (x.double().nan_to_num(0, 0, 0) for x in (a, b.to(a.device)))
    return bool((wide_a - wide_b).norm() <= tolerance(a, b) * wide_b.norm())


def explain_scale(
    scale: float, dtype: torch.dtype, config: Any, modules: Sequence[nn.Module]
) -> tuple[float, str] | None:
    """Return the exact value of a measured scale and the setting it comes from, or None if no setting is close."""
    near = _SCALE_TOLERANCE.get(dtype, 1e-5)
    if abs(scale - 1) <= near:
        return 1.0, ""
    for name, value in _settings(config, modules):
        if abs(value - scale) <= near * abs(scale):
            return value, name
    return None


def _settings(config: Any, modules: Sequence[nn.Module]) -> Iterator[tuple[str, float]]:
    """Yield the possible scales among the attributes of configuration and modules, then values derived from them."""
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
