"""Gemma Scope 1 (Gemma 2): `params.npz` of a JumpReLU SAE or transcoder (arXiv 2408.05147).

The file holds tensors only. Where an SAE belongs is in its path:
`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz`. `b_dec` is not subtracted from the input.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ....core.disk import replacing
from ....core.errors import SaeError
from ..folding import as_jumprelu, float32_copy, require, subtracting_b_dec
from ..format import SaeFormat
from ..parts import SaeParts, check_tensors, encoder_shape, take
from ..reading import read_npz

WEIGHTS_NAME = "params.npz"

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_PLACES = {
    "res": ("{}.resid_post", ""),
    "mlp": ("{}.mlp_out", ""),
    "att": ("{}.attn_z", ""),
    "transcoders": ("{}.mlp_in_normalized", "{}.mlp_out"),
}


def _find(path: Path) -> list[Path]:
    if path.name == WEIGHTS_NAME and path.is_file():
        return [path.parent]
    return [path] if (path / WEIGHTS_NAME).is_file() else []


def read(folder: Path) -> SaeParts:
    """Read an SAE; its hook point is what the path says, and empty where the path does not say it.

    Raises:
        SaeError: it is damaged or holds other tensors.
    """
    where = f"SAE at '{folder}'"
    tensors = read_npz(folder / WEIGHTS_NAME, where)
    tensors = {f"W_{name[2:]}" if name.startswith("w_") else name: tensor for name, tensor in tensors.items()}
    tensors = take(tensors, {name: name for name in _NAMES}, (), where)
    d_in, d_sae = encoder_shape(tensors)
    check_tensors("jumprelu", tensors, (d_in, d_sae, d_in), where, f"W_enc in {WEIGHTS_NAME}")
    parts = SaeParts("jumprelu", tensors, "", {"apply_b_dec_to_input": False}, {})
    return _placed(parts, folder)


def _placed(parts: SaeParts, folder: Path) -> SaeParts:
    """Return the SAE with what its path says: the model, the hook points, the published L0, and embedding SAEs."""
    path = folder.absolute().as_posix()
    metadata: dict[str, Any] = {}
    repository, layer = _last(_REPOSITORY, path), _last(re.compile(r"layer_(\d+)"), path)
    l0 = _last(re.compile(r"average_l0_(\d+)"), path)
    if l0:
        metadata["published"] = {"l0": int(l0[1])}
    if repository is None:
        return replace(parts, metadata=metadata)
    metadata["model_name"] = f"google/gemma-2-{repository[1]}" + ("-it" if repository[2] == "it" else "")
    if repository[3] == "res" and "/embedding/" in f"{path}/":
        return _of_embeddings(replace(parts, metadata=metadata))
    if layer is None:
        return replace(parts, metadata=metadata)
    reads, writes = (name.format(f"blocks.{int(layer[1])}") for name in _PLACES[repository[3]])
    if writes:
        return replace(
            parts,
            architecture="jumprelu_transcoder",
            hook_point=reads,
            metadata=metadata | {"hook_name_out": writes},
        )
    return replace(parts, hook_point=reads, metadata=metadata)


def _of_embeddings(parts: SaeParts) -> SaeParts:
    """Return an SAE of the embedding table's rows as one of the stream, which Gemma enters as sqrt(d) times them."""
    root = parts.tensors["W_enc"].shape[0] ** 0.5
    tensors = {name: tensor.float() for name, tensor in parts.tensors.items()}
    tensors |= {"W_enc": tensors["W_enc"] / root, "W_dec": tensors["W_dec"] * root, "b_dec": tensors["b_dec"] * root}
    folded = ("the model's factor sqrt(d_in) of embeddings, because the SAE was trained on rows of the table",)
    return replace(parts, tensors=tensors, hook_point="blocks.0.resid_pre", folded=folded)


def _last(pattern: re.Pattern[str], path: str) -> re.Match[str] | None:
    found = list(pattern.finditer(path))
    return found[-1] if found else None


def write(parts: SaeParts, folder: Path) -> None:
    """Write `params.npz`. The hook point is not in it: the folder's path must say that.

    Raises:
        SaeError: it is neither an autoencoder nor a transcoder as wide as its input.
        NotExactError: its latents are the k largest.
    """
    require(parts, "gemma-scope", ("standard", "jumprelu", "gated"), ("sae", "transcoder"))
    parts = as_jumprelu(subtracting_b_dec(parts, False), "gemma-scope")
    if parts.tensors["W_enc"].shape[0] != parts.tensors["W_dec"].shape[1]:
        raise SaeError("gemma-scope has transcoders that write as many channels as they read; this one does not")
    with replacing(folder / WEIGHTS_NAME) as partial, partial.open("wb") as file:
        arrays: dict[str, Any] = {name: float32_copy(parts.tensors[name]).numpy() for name in _NAMES}
        np.savez(file, **arrays)


FORMAT = SaeFormat("gemma-scope", WEIGHTS_NAME, _find, read, write)
