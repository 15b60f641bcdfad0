"""Layers of Gemma Scope 2's crosscoders and cross-layer transcoders, put together and taken apart.

`W_dec` of a layer is `[d_sae, n_layers, d_out]`: what its latents write to every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.errors import SaeError
from ..cross_layer import ARCHITECTURE as CROSS_LAYER
from ..cross_layer import check_cross_layer
from ..folding import NotExactError, as_jumprelu, subtracting_b_dec
from ..kinds import Kind, find_kind
from ..parts import SaeParts, check_tensors

_NEGLIGIBLE = 1e-6
"""How small decoders to earlier layers must be, as a part of all decoders' norm, to be zeros that rounding left."""


def crosscoder_parts(
    layers: Sequence[Mapping[str, Tensor]], hook_points: list[str], metadata: dict[str, Any], where: str
) -> SaeParts:
    """Return a crosscoder of all layers; an encoder reads its own layer, so `W_enc` is zero elsewhere."""
    _check_layers(layers, where)
    skip = "W_skip" in layers[0]
    tensors = {
        "W_enc": torch.block_diag(*(layer["W_enc"] for layer in layers)),
        "W_dec": torch.cat([layer["W_dec"].flatten(1) for layer in layers]),
        **{name: torch.cat([layer[name] for layer in layers]) for name in ("b_enc", "threshold", "b_dec")},
    }
    if skip:
        tensors["W_skip"] = torch.block_diag(*(layer["W_skip"] for layer in layers))
    kind = Kind("jumprelu", "crosscoder", skip)
    d_in, d_sae = tensors["W_enc"].shape
    check_tensors(kind.name, tensors, (d_in, d_sae, d_in), where, "the number of its files")
    config = {"hook_points": hook_points, "apply_b_dec_to_input": False}
    return SaeParts(kind.name, tensors, hook_points[0], config, metadata)


def cross_layer_parts(layers: Sequence[Mapping[str, Tensor]], metadata: dict[str, Any], where: str) -> SaeParts:
    """Return a cross-layer transcoder, whose latents write to their own and later layers.

    Raises:
        SaeError: a layer's latents write to an earlier one.
    """
    _check_layers(layers, where)
    n = len(layers)
    tensors, folded = {}, ()
    for i, layer in enumerate(layers):
        W_dec = layer["W_dec"]
        earlier = float(W_dec[:, :i].float().norm()) if i else 0.0
        if earlier > _NEGLIGIBLE * float(W_dec.float().norm()):
            raise SaeError(
                f"{where} has decoders from layer {i} to earlier layers of norm {earlier:.3g}; a cross-layer "
                "transcoder's latents write to their own and later layers"
            )
        if earlier:
            folded = ("decoders to earlier layers, which are zero up to rounding, are left out",)
        tensors |= {f"W_enc_{i}": layer["W_enc"].T, f"W_dec_{i}": W_dec[:, i:]}
        tensors |= {f"{name}_{i}": layer[name] for name in ("b_enc", "b_dec", "threshold")}
        tensors |= {f"W_skip_{i}": layer["W_skip"]} if "W_skip" in layer else {}
    d_in, d_sae = layers[0]["W_enc"].shape
    check_cross_layer(tensors, (n, d_sae, d_in, len(layers[0]["b_dec"])), "jumprelu", where)
    config = {
        "activation": "jumprelu",
        "reads": [f"blocks.{i}.mlp_in" for i in range(n)],
        "writes": [f"blocks.{i}.mlp_out" for i in range(n)],
    }
    return SaeParts(CROSS_LAYER, tensors, "", config, metadata, folded)


def _check_layers(layers: Sequence[Mapping[str, Tensor]], where: str) -> None:
    first = layers[0]
    if first["W_enc"].ndim != 2:
        raise SaeError(f"{where} is damaged: w_enc has {first['W_enc'].ndim} dimensions, expected 2")
    d_in, d_sae = first["W_enc"].shape
    d_out = len(first["b_dec"])
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "threshold": (d_sae,),
        "W_dec": (d_sae, len(layers), d_out),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
    }
    for number, layer in enumerate(layers):
        if set(layer) != set(first):
            raise SaeError(f"{where} is damaged: layer {number} has other tensors than layer 0")
        for name, tensor in layer.items():
            if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
                raise SaeError(
                    f"{where} is damaged: {name} of layer {number} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                    f"expected floating-point numbers of shape {shapes[name]}"
                )


def split_layers(parts: SaeParts) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Return the layers of a crosscoder or cross-layer transcoder, and its `type` and hook points.

    Raises:
        NotExactError: a latent of a crosscoder reads several hook points, or the k largest latents are chosen.
        SaeError: hook points are not those of the format.
    """
    if parts.architecture == CROSS_LAYER:
        return _split_cross_layer(parts), {"type": "clt", "reads": parts.config["reads"]}
    kind = find_kind(parts.architecture)
    if kind.selection == "topk":
        raise NotExactError(f"gemma-scope-2 has thresholds, and this {parts.architecture} chooses the k largest")
    names = parts.config.get("hook_points")
    if names is None:
        raise SaeError("gemma-scope-2 has crosscoders that write what they read; this one writes other hook points")
    parts = as_jumprelu(subtracting_b_dec(parts, False), "gemma-scope-2")
    tensors = parts.tensors
    n, (d_in, d_sae) = len(names), tensors["W_enc"].shape
    if d_sae % n:
        raise NotExactError(f"gemma-scope-2's crosscoders have as many latents for each of the {n} hook points")
    reads = (tensors["W_enc"].reshape(n, d_in // n, d_sae) != 0).any(dim=1)
    own = torch.arange(n)[:, None] == torch.arange(d_sae) // (d_sae // n)
    if bool((reads & ~own).any()):
        raise NotExactError("gemma-scope-2's crosscoders have latents that read one hook point each, in order of it")
    width, each = d_in // n, d_sae // n
    layers = []
    for i in range(n):
        mine, rows = slice(i * each, (i + 1) * each), slice(i * width, (i + 1) * width)
        layer = {
            "W_enc": tensors["W_enc"][rows, mine],
            "W_dec": tensors["W_dec"][mine].reshape(each, n, width),
            "b_enc": tensors["b_enc"][mine],
            "threshold": tensors["threshold"][mine],
            "b_dec": tensors["b_dec"][rows],
        }
        if kind.skip:
            off = tensors["W_skip"][rows].clone()
            layer["W_skip"] = off[:, rows].clone()
            off[:, rows] = 0
            if bool((off != 0).any()):
                raise NotExactError("gemma-scope-2's skip connections join a hook point to itself alone")
        layers.append(layer)
    return layers, {"type": "crosscoder", "hook_points": list(names)}


def _split_cross_layer(parts: SaeParts) -> list[dict[str, Tensor]]:
    reads, writes = parts.config["reads"], parts.config["writes"]
    n = len(reads)
    for names, kind in ((reads, "mlp_in"), (writes, "mlp_out")):
        if list(names) != [f"blocks.{i}.{kind}" for i in range(n)]:
            raise SaeError(
                f"gemma-scope-2's cross-layer transcoders have blocks.N.{kind} of all layers; this has {names}"
            )
    if parts.config["activation"] == "topk":
        raise NotExactError("gemma-scope-2 has thresholds, and this cross-layer transcoder chooses the k largest")
    layers = []
    for i in range(n):
        W_dec = parts.tensors[f"W_dec_{i}"]
        every = W_dec.new_zeros(W_dec.shape[0], n, W_dec.shape[2])
        every[:, i:] = W_dec
        b_enc = parts.tensors[f"b_enc_{i}"]
        layer = {
            "W_enc": parts.tensors[f"W_enc_{i}"].T,
            "W_dec": every,
            "b_enc": b_enc,
            "b_dec": parts.tensors[f"b_dec_{i}"],
            "threshold": parts.tensors.get(f"threshold_{i}", torch.zeros_like(b_enc)),
        }
        if f"W_skip_{i}" in parts.tensors:
            layer["W_skip"] = parts.tensors[f"W_skip_{i}"]
        layers.append(layer)
    return layers
