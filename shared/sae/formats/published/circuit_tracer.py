"""circuit-tracer's transcoders: `layer_N.safetensors`, or `W_enc_N` and `W_dec_N.safetensors` of cross-layer ones.

`config.yaml` beside them says which hook points are read and written. `b_dec` is not subtracted from the input. The
library zeroes the latents of a text's first position (`zero_positions`); the file does not, and nor does reading it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from ....core.disk import replacing, write_file
from ....core.errors import SaeError
from ....model.hook_points import block_and_kind, canonical_hook_point
from ..cross_layer import ARCHITECTURE as CROSS_LAYER
from ..cross_layer import check_cross_layer
from ..files import saelens_hook_name
from ..folding import NotExactError, float32_copy, require, subtracting_b_dec
from ..format import SaeFormat
from ..kinds import Kind
from ..parts import SaeParts, check_known, check_tensors, check_top_k, integer, take, text
from ..reading import read_safetensors, read_yaml

CONFIG_NAME = "config.yaml"

_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")
_TENSORS = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_THRESHOLD = "activation_function.threshold"
_KEYS = (
    *("model_name", "model_kind", "feature_input_hook", "feature_output_hook"),
    *("scan", "repo_id", "revision", "subfolder", "transcoders", "activation", "k"),
)
_ACTIVATIONS = ("relu", "jumprelu", "topk")


def _find(path: Path) -> list[Path]:
    """Return the layers of a set, or the folder of a cross-layer transcoder."""
    if path.is_file():
        return [path] if _LAYER_FILE.fullmatch(path.name) and (path.parent / CONFIG_NAME).is_file() else []
    if (path / "W_enc_0.safetensors").is_file():
        return [path]
    if not (path / CONFIG_NAME).is_file():
        return []
    layers = [(int(found[1]), file) for file in path.iterdir() if (found := _LAYER_FILE.fullmatch(file.name))]
    return [file for _, file in sorted(layers)]


def read(path: Path) -> SaeParts:
    """Read one layer's transcoder, or a cross-layer transcoder from its folder.

    Raises:
        SaeError: it is damaged, or has a key or tensor that is not known.
    """
    folder = path.parent if path.is_file() else path
    where = f"SAE at '{path}'"
    config = read_yaml(folder / CONFIG_NAME, where)
    check_known(config, _KEYS, where)
    hooks = [text(config, key, where) for key in ("feature_input_hook", "feature_output_hook")]
    if not all(hooks):
        raise SaeError(f"{where}: {CONFIG_NAME} lacks feature_input_hook or feature_output_hook")
    name = text(config, "model_name", where)
    metadata = {"model_name": name} if name else {}
    if not path.is_file():
        return _read_cross_layer(folder, hooks, metadata, where)
    found = _LAYER_FILE.fullmatch(path.name)
    assert found is not None
    reads, writes = (canonical_hook_point(f"blocks.{int(found[1])}.{hook}") for hook in hooks)
    tensors = read_safetensors(path, where)
    activation = text(config, "activation", where) or ("jumprelu" if _THRESHOLD in tensors else "relu")
    if activation not in _ACTIVATIONS or (activation == "jumprelu") != (_THRESHOLD in tensors):
        raise SaeError(
            f"{where} has activation '{activation}', and its weights {'have' if _THRESHOLD in tensors else 'no'} "
            f"thresholds; expected one of: {', '.join(_ACTIVATIONS)}, and thresholds for jumprelu alone"
        )
    selection = {"relu": "standard"}.get(activation, activation)
    skip = "W_skip" in tensors
    kind = Kind(selection, "transcoder", skip)
    names = _TENSORS | ({"threshold": _THRESHOLD} if selection == "jumprelu" else {})
    taken = take(tensors, names | ({"W_skip": "W_skip"} if skip else {}), ("k",) if selection == "topk" else (), where)
    if taken["W_enc"].ndim != 2:
        raise SaeError(f"{where} is damaged: W_enc has {taken['W_enc'].ndim} dimensions, expected 2")
    d_in, d_sae = taken["W_enc"].shape
    check_tensors(kind.name, taken, (d_in, d_sae, taken["W_dec"].shape[-1]), where, "W_enc")
    own: dict[str, Any] = {"apply_b_dec_to_input": False}
    if selection == "jumprelu":
        _check_thresholds(taken["threshold"], where)
    if selection == "topk":
        own["k"] = int(tensors["k"]) if "k" in tensors else integer(config, "k", where)
        check_top_k(own["k"], d_sae, where)
    return SaeParts(kind.name, taken, reads, own, metadata | {"hook_name_out": writes})


def _read_cross_layer(folder: Path, hooks: list[str | None], metadata: dict[str, Any], where: str) -> SaeParts:
    n = len(list(folder.glob("W_enc_*.safetensors")))
    tensors: dict[str, Tensor] = {}
    for i in range(n):
        for part in (f"W_enc_{i}", f"W_dec_{i}"):
            if not (folder / f"{part}.safetensors").is_file():
                raise SaeError(f"{where} lacks {part}.safetensors; expected both files of each of its {n} layers")
            tensors |= read_safetensors(folder / f"{part}.safetensors", where)
    activation = "jumprelu" if "threshold_0" in tensors else "relu"
    if "W_enc_0" not in tensors or tensors["W_enc_0"].ndim != 2 or "b_dec_0" not in tensors:
        raise SaeError(f"{where} is damaged: W_enc_0.safetensors lacks W_enc_0 of two dimensions, or b_dec_0")
    d_sae, d_in = tensors["W_enc_0"].shape
    check_cross_layer(tensors, (n, d_sae, d_in, len(tensors["b_dec_0"])), activation, where)
    for i in range(n if activation == "jumprelu" else 0):
        _check_thresholds(tensors[f"threshold_{i}"], where)
    reads, writes = ([canonical_hook_point(f"blocks.{i}.{hook}") for i in range(n)] for hook in hooks)
    config = {"activation": activation, "reads": reads, "writes": writes}
    return SaeParts(CROSS_LAYER, tensors, "", config, metadata)


def _check_thresholds(threshold: Tensor, where: str) -> None:
    """Raise `SaeError` for a threshold below zero: the library applies no ReLU, so its latent could be negative."""
    if bool((threshold < 0).any()):
        raise SaeError(f"{where} has a threshold below zero, above which latents would be negative; expected none")


def write(parts: SaeParts, folder: Path) -> None:
    """Write one layer's file of a set, or a cross-layer transcoder; layers of a set may be written one by one.

    Raises:
        SaeError: it is not a transcoder, or what is in the folder is of another model or of other hook points.
        NotExactError: its latents are the k largest.
    """
    if parts.architecture == CROSS_LAYER:
        _write_cross_layer(parts, folder)
        return
    kind = require(parts, "circuit-tracer", ("standard", "jumprelu"), ("transcoder", "skip"))
    layer, hooks = _layer_and_hooks([parts.hook_point], [str(parts.metadata.get("hook_name_out") or "")])
    parts = subtracting_b_dec(parts, False)
    saved = {}
    for ours, name in _TENSORS.items():
        tensor = float32_copy(parts.tensors[ours])
        saved[name.removesuffix(".T")] = tensor.T.contiguous() if name.endswith(".T") else tensor
    if kind.selection == "jumprelu":
        # Latents are positive here, so a threshold below zero does as much as zero.
        saved[_THRESHOLD] = float32_copy(parts.tensors["threshold"]).clamp_min(0)
    if kind.skip:
        saved["W_skip"] = float32_copy(parts.tensors["W_skip"])
    _write_config(folder, "transcoder_set", hooks, parts.metadata)
    with replacing(folder / f"layer_{layer}.safetensors") as partial:
        save_file(saved, partial, metadata={"format": "pt"})


def _write_cross_layer(parts: SaeParts, folder: Path) -> None:
    if parts.config["activation"] == "topk":
        raise NotExactError("circuit-tracer has no TopK cross-layer transcoders; expected relu or jumprelu")
    if "W_skip_0" in parts.tensors:
        raise SaeError("circuit-tracer's files hold no skip paths of cross-layer transcoders")
    reads = list(parts.config["reads"])
    first, hooks = _layer_and_hooks(reads, list(parts.config["writes"]))
    if first != 0:
        raise SaeError(f"circuit-tracer's layers begin at block 0; this one reads '{reads[0]}' first")
    _write_config(folder, "cross_layer_transcoder", hooks, parts.metadata)
    for i in range(len(reads)):
        names = [f"{name}_{i}" for name in ("W_enc", "b_enc", "b_dec", "threshold") if f"{name}_{i}" in parts.tensors]
        for file, saved in ((f"W_enc_{i}", names), (f"W_dec_{i}", [f"W_dec_{i}"])):
            with replacing(folder / f"{file}.safetensors") as partial:
                tensors = {name: float32_copy(parts.tensors[name]) for name in saved}
                if f"threshold_{i}" in tensors:
                    tensors[f"threshold_{i}"].clamp_min_(0)
                save_file(tensors, partial, metadata={"format": "pt"})


def _layer_and_hooks(reads: list[str], writes: list[str]) -> tuple[int, tuple[str, str]]:
    """Return the first layer and the two hooks below `blocks.N.` that all layers share, in TransformerLens's names."""
    found: list[set[str]] = [set(), set()]
    first = block_and_kind(reads[0])
    for names, hooks in zip((reads, writes), found, strict=True):
        for number, name in enumerate(names):
            place = block_and_kind(name)
            if place is None or first is None or place[0] != first[0] + number:
                raise SaeError(
                    f"circuit-tracer's transcoders read and write consecutive blocks, from blocks.N.KIND; got '{name}'"
                )
            hooks.add(re.sub(r"^blocks\.\d+\.", "", saelens_hook_name(name)))
    if any(len(hooks) != 1 for hooks in found) or first is None:
        raise SaeError("circuit-tracer's layers all read one kind of hook point and write one kind")
    return first[0], (found[0].pop(), found[1].pop())


def _write_config(folder: Path, kind: str, hooks: tuple[str, str], metadata: Mapping[str, Any]) -> None:
    config = {
        "model_name": metadata.get("model_name") or "",
        "model_kind": kind,
        "feature_input_hook": hooks[0],
        "feature_output_hook": hooks[1],
    }
    path = folder / CONFIG_NAME
    if path.is_file():
        there = read_yaml(path, f"the set at '{folder}'")
        if different := [key for key, value in config.items() if there.get(key) != value]:
            key = different[0]
            raise SaeError(f"the set at '{folder}' has {key} {there.get(key)!r}, and this layer {config[key]!r}")
        return
    write_file(path, yaml.safe_dump(config, sort_keys=False).encode())


FORMAT = SaeFormat(
    "circuit-tracer", f"{CONFIG_NAME} and layer_N.safetensors, or W_enc_N and W_dec_N.safetensors", _find, read, write
)
