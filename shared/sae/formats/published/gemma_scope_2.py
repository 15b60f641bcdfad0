"""Gemma Scope 2 (Gemma 3): `params.safetensors`, or `params_layer_N.safetensors` of crosscoders and CLTs.

All are JumpReLU and subtract no `b_dec`. Hook points are module paths of the Hugging Face model, with `.output` or
`.input`, in a `config.json` that some folders lack; there the path says what they are, as
`resid_post/layer_12_width_16k_l0_medium`. Crosscoders and CLTs have an encoder per layer, which reads that layer alone,
and a decoder to every layer, `w_dec` `[d_sae, n_layers, d_out]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ....core.disk import replacing, write_file
from ....core.errors import SaeError
from ..cross_layer import ARCHITECTURE as CROSS_LAYER
from ..folding import as_jumprelu, float32_copy, require, subtracting_b_dec
from ..format import SaeFormat
from ..kinds import Kind
from ..parts import SaeParts, check_known, check_tensors, flag, take, text
from ..reading import read_json, read_safetensors
from .multi_layer import cross_layer_parts, crosscoder_parts, split_layers

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "params.safetensors"

_TENSORS = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
_SKIP = {"W_skip": "affine_skip_connection.T"}
_KEYS = (
    *("architecture", "affine_connection", "hf_hook_point_in", "hf_hook_point_out", "hf_hook_points"),
    *("type", "width", "l0", "model_name"),
)
_MODULES = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
_MODULE = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")
_SITES = {"resid_post": "resid_post", "attn_out": "attn_z", "mlp_out": "mlp_out"}
_REPOSITORY = re.compile(r"gemma-scope-2-(\d+[bm])-(pt|it)")
_LAYER_FILE = re.compile(r"params_layer_(\d+)\.safetensors")


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path.parent] if path.name == WEIGHTS_NAME or _LAYER_FILE.fullmatch(path.name) else []
    return [path] if (path / WEIGHTS_NAME).is_file() or (path / "params_layer_0.safetensors").is_file() else []


def read(folder: Path) -> SaeParts:
    """Read an SAE, transcoder, crosscoder or cross-layer transcoder.

    Raises:
        SaeError: it is damaged, or has a key or tensor that is not known.
    """
    where = f"SAE at '{folder}'"
    config = read_json(folder / CONFIG_NAME, where) if (folder / CONFIG_NAME).is_file() else {}
    check_known(config, _KEYS, where)
    architecture = text(config, "architecture", where) or "jump_relu"
    if architecture != "jump_relu":
        raise SaeError(f"{where} has architecture '{architecture}', expected 'jump_relu'")
    metadata = _metadata(config, folder, where)
    if not (folder / WEIGHTS_NAME).is_file():
        return _read_layers(folder, config, metadata, where)
    tensors = read_safetensors(folder / WEIGHTS_NAME, where)
    skip = "affine_skip_connection" in tensors
    if flag(config, "affine_connection", where, skip) != skip:
        raise SaeError(f"{where} has affine_connection {not skip}, and its weights say {skip}; expected the same")
    taken = take(tensors, _TENSORS | (_SKIP if skip else {}), (), where)
    reads, writes = _hook_points(config, folder, where)
    transcodes = bool(skip or (writes and writes != reads))
    kind = Kind("jumprelu", "transcoder" if transcodes else "sae", skip)
    if taken["W_enc"].ndim != 2:
        raise SaeError(f"{where} is damaged: w_enc has {taken['W_enc'].ndim} dimensions, expected 2")
    d_in, d_sae = taken["W_enc"].shape
    check_tensors(kind.name, taken, (d_in, d_sae, taken["W_dec"].shape[-1]), where, f"w_enc in {WEIGHTS_NAME}")
    if transcodes and writes:
        metadata["hook_name_out"] = writes
    return SaeParts(kind.name, taken, reads, {"apply_b_dec_to_input": False}, metadata)


def _metadata(config: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    repository = _REPOSITORY.search(folder.absolute().as_posix())
    name = text(config, "model_name", where)
    if name:
        # Some files say gemma-v3, which is no repository; the smallest model has no -pt in its name.
        name = name.replace("-v3", "-3")
        name = name if "/" in name else f"google/{name}"
        metadata["model_name"] = name.removesuffix("-pt") if "270m" in name else name
    elif repository:
        suffix = "" if repository[1] == "270m" and repository[2] == "pt" else f"-{repository[2]}"
        metadata["model_name"] = f"google/gemma-3-{repository[1]}{suffix}"
    if isinstance(config.get("l0"), int | float) and not isinstance(config["l0"], bool):
        metadata["published"] = {"l0": config["l0"]}
    return metadata


def _hook_points(config: Mapping[str, Any], folder: Path, where: str) -> tuple[str, str]:
    """Return what is read and written, from the configuration or else the path; empty where neither says it."""
    names = [text(config, key, where) for key in ("hf_hook_point_in", "hf_hook_point_out")]
    if names[0]:
        return _canonical(names[0], where), _canonical(names[1], where) if names[1] else ""
    layer = re.search(r"layer_(\d+)(?:_|$)", folder.name)
    site = folder.absolute().parent.name.removesuffix("_all")
    if layer is None:
        return "", ""
    block = f"blocks.{int(layer[1])}"
    if site == "transcoder":
        return f"{block}.mlp_in", f"{block}.mlp_out"
    return (f"{block}.{_SITES[site]}" if site in _SITES else ""), ""


def _canonical(name: str, where: str) -> str:
    found = _MODULE.fullmatch(name)
    if found is None or found[2] not in _MODULES:
        expected = ", ".join(f"model.layers.N.{module}" for module in _MODULES)
        raise SaeError(f"{where} has the hook point '{name}', which is not known; expected one of: {expected}")
    return f"blocks.{int(found[1])}.{_MODULES[found[2]]}"


def _module(hook_point: str) -> str:
    """Return the name that Gemma Scope 2 has for a hook point."""
    for module, kind in _MODULES.items():
        found = re.fullmatch(rf"blocks\.(\d+)\.{kind}", hook_point)
        if found:
            return f"model.layers.{found[1]}.{module}"
    known = ", ".join(_MODULES.values())
    raise SaeError(f"gemma-scope-2 has no hook point '{hook_point}'; expected blocks.N. and one of: {known}")


# Crosscoders and cross-layer transcoders


def _read_layers(folder: Path, config: Mapping[str, Any], metadata: dict[str, Any], where: str) -> SaeParts:
    numbers = sorted(int(found[1]) for file in folder.iterdir() if (found := _LAYER_FILE.fullmatch(file.name)))
    if numbers != list(range(len(numbers))):
        raise SaeError(f"{where} has params_layer files {numbers}, expected every number from 0; copy those missing")
    layers = []
    for number in numbers:
        tensors = read_safetensors(folder / f"params_layer_{number}.safetensors", where)
        skip = _SKIP if "affine_skip_connection" in tensors else {}
        layers.append(take(tensors, _TENSORS | skip, (), where))
    path = folder.absolute()
    said = text(config, "type", where) or path.parent.name
    if "crosscoder" in said:
        listed = re.match(r"layer_(\d+(?:_\d+)*)_width", path.name)
        places = config.get("hf_hook_points") or (
            [f"model.layers.{number}.output" for number in listed[1].split("_")] if listed else None
        )
        if not isinstance(places, list) or len(places) != len(layers):
            raise SaeError(
                f"{where} is a crosscoder of {len(layers)} layers whose path does not say which; expected a folder "
                "such as layer_7_13_17_22_width_65k_l0_medium"
            )
        names = [_canonical(str(name), where) for name in places]
        return crosscoder_parts(layers, names, metadata, where)
    if "clt" not in said:
        raise SaeError(f"{where} is a crosscoder or a cross-layer transcoder; expected it in a folder named after that")
    return cross_layer_parts(layers, metadata, where)


def write(parts: SaeParts, folder: Path) -> None:
    """Write an SAE, transcoder, crosscoder of encoders that read one layer each, or cross-layer transcoder.

    Raises:
        SaeError: the format has no such kind or hook point.
        NotExactError: its latents are the k largest.
    """
    config: dict[str, Any] = {"architecture": "jump_relu"}
    if parts.metadata.get("model_name"):
        config["model_name"] = parts.metadata["model_name"]
    l0 = (parts.metadata.get("published") or {}).get("l0")
    config |= {"l0": l0} if l0 is not None else {}
    if parts.architecture == CROSS_LAYER or parts.architecture.endswith("crosscoder"):
        layers, extra = split_layers(parts)
        if "reads" not in extra:
            config["hf_hook_points"] = [_module(name) for name in extra["hook_points"]]
        config |= {"type": extra["type"], "affine_connection": "W_skip" in layers[0]}
        for number, tensors in enumerate(layers):
            _save(folder / f"params_layer_{number}.safetensors", tensors)
    else:
        kind = require(parts, "gemma-scope-2", ("standard", "jumprelu", "gated"), ("sae", "transcoder", "skip"))
        parts = as_jumprelu(subtracting_b_dec(parts, False), "gemma-scope-2")
        config["affine_connection"] = kind.skip
        if parts.hook_point:
            config["hf_hook_point_in"] = _module(parts.hook_point)
        if parts.metadata.get("hook_name_out"):
            config["hf_hook_point_out"] = _module(str(parts.metadata["hook_name_out"]))
        _save(folder / WEIGHTS_NAME, parts.tensors)
    write_file(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    names = _TENSORS | (_SKIP if "W_skip" in tensors else {})
    saved = {}
    for ours, name in names.items():
        tensor = float32_copy(tensors[ours])
        saved[name.removesuffix(".T")] = tensor.T.contiguous() if name.endswith(".T") else tensor
    with replacing(path) as partial:
        save_file(saved, partial, metadata={"format": "pt"})


FORMAT = SaeFormat("gemma-scope-2", f"{WEIGHTS_NAME} or params_layer_N.safetensors", _find, read, write)
