"""Convert tensors between normalised and raw rows, for SAEs that write other hook points than they read.

Inputs and targets then have separate normalisations, so that latents keep their size when the encoder's scale changes.
Tensors have the layout of an `Sae`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....shared.core.errors import SaeError
from ....shared.model.wiring import Wiring
from ....shared.sae import Sae
from ...stream.normalization import Normalization
from ..contract import Parameters


def to_raw(parameters: Parameters, normalization: Normalization, unit: float, bias: str = "b_enc") -> dict[str, Tensor]:
    """Return tensors for raw rows, with latents divided by `unit`."""
    mean, scale = normalization.mean.to(parameters["W_enc"].dtype), normalization.scale
    target = normalization.target or normalization
    W_enc, W_dec = parameters["W_enc"] * scale, parameters["W_dec"] / target.scale
    b_dec = parameters["b_dec"] / target.scale + target.mean.to(W_dec.dtype)
    tensors = {
        "W_enc": W_enc.T / unit,
        bias: (parameters[bias] - W_enc @ mean) / unit,
        "W_dec": W_dec * unit,
        "b_dec": b_dec,
    }
    if "W_skip" in parameters:
        W_skip = (parameters["W_skip"] * scale).T / target.scale
        tensors |= {"W_skip": W_skip.T, "b_dec": b_dec - mean @ W_skip}
    return tensors


def to_normalized(sae: Sae, wiring: Wiring, normalization: Normalization, unit: float) -> dict[str, Tensor]:
    """Return an SAE's tensors for normalised rows, in a wiring's order, with latents multiplied by `unit`."""
    tensors = in_order(sae, wiring)
    mean, scale = normalization.mean, normalization.scale
    target = normalization.target or normalization
    shift = mean @ tensors["W_enc"]
    if sae.apply_b_dec_to_input:
        shift = shift - tensors["b_dec"] @ tensors["W_enc"]
    found = {
        "W_enc": (tensors["W_enc"].T / scale).T * unit,
        "W_dec": tensors["W_dec"] * target.scale / unit,
    }
    b_dec = tensors["b_dec"] - target.mean
    if "W_skip" in tensors:
        b_dec = b_dec + mean @ tensors["W_skip"].T
        found["W_skip"] = tensors["W_skip"] / scale * _column(target.scale)
    found["b_dec"] = b_dec * target.scale
    for name in ("b_enc", "b_gate", "b_mag", "threshold"):
        if name in tensors:
            # A gated SAE scales its magnitudes before it adds their bias.
            moved = shift * tensors["r_mag"].exp() if name == "b_mag" else 0.0 if name == "threshold" else shift
            found[name] = (tensors[name] + moved) * unit
    return found | ({"r_mag": tensors["r_mag"]} if "r_mag" in tensors else {})


def _column(scale: float | Tensor) -> float | Tensor:
    return scale[:, None] if isinstance(scale, Tensor) else scale


def in_order(sae: Sae, wiring: Wiring) -> dict[str, Tensor]:
    """Return an SAE's tensors with its hook points in a wiring's order, matched by name.

    Raises:
        SaeError: the SAE has other hook points, or is a transcoder that does not name its output.
    """
    if wiring.kind == "transcoder":
        _ = sae.target_hook_point
    tensors = {name: tensor.detach() for name, tensor in sae.named_parameters()}
    if wiring.kind != "crosscoder":
        return tensors
    read, written = _order(sae.reads, wiring.reads), _order(sae.writes, wiring.writes)
    tensors["W_enc"] = _blocks(tensors["W_enc"], read)
    tensors["W_dec"] = _blocks(tensors["W_dec"].T, written).T
    tensors["b_dec"] = _blocks(tensors["b_dec"], written)
    if "W_skip" in tensors:
        tensors["W_skip"] = _blocks(_blocks(tensors["W_skip"], written).T, read).T
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _order(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    if sorted(theirs) != sorted(ours):
        raise SaeError(f"the crosscoder is of {', '.join(theirs)}; expected {', '.join(ours)}, in any order")
    return [theirs.index(name) for name in ours]


def _blocks(tensor: Tensor, order: list[int]) -> Tensor:
    return tensor.reshape(len(order), -1, *tensor.shape[1:])[order].reshape(tensor.shape)
