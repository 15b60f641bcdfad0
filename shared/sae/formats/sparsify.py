"""sparsify's SAEs and transcoders: `cfg.json` and `sae.safetensors`, TopK; SAEs subtract `b_dec` from the input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...core.disk import replacing, write_file
from ...core.errors import SaeError
from ...model.hook_points import block_and_kind, canonical_hook_point
from .folding import float32_copy, require, split_signs, subtracting_b_dec
from .format import SaeFormat, folders
from .parts import SaeParts, check_known, check_tensors, check_top_k, flag, integer, take, text
from .reading import read_json, read_safetensors

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"

_UNSUPPORTED = ("signed",)
_TENSORS = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_READ = (
    *("activation", "expansion_factor", "num_latents", "k", "d_in", "hook_name", "hook_name_out"),
    *("transcode", "skip_connection"),
)
_TRAINING = ("normalize_decoder", "multi_topk", "hook_layer")
"""Settings that change how an SAE is trained, or where, not what it computes."""

_MODULE_PATH = re.compile(r"([a-z_]+\.)*(layers|h|blocks)\.\d+(\.[a-z_0-9]+)*")
_BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)")
_MLP = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)\.mlp")


def recognises(folder: Path) -> bool:
    """Return whether a folder has this format's weights."""
    return (folder / WEIGHTS_NAME).is_file()


def weights_name(folder: Path) -> str:
    """Return the name of a folder's weights."""
    return WEIGHTS_NAME


def read(folder: Path) -> SaeParts:
    """Read an SAE; sparsify names folders after the module, unless the configuration says where it belongs.

    Raises:
        SaeError: it is damaged, or its encoder is not TopK's.
    """
    where = f"SAE at '{folder}'"
    config = read_json(folder / CONFIG_NAME, where)
    for key in _UNSUPPORTED:
        if config.get(key) not in (None, False):
            raise SaeError(
                f"{where} has {key} = {config[key]!r}, which is not supported; expected a TopK SAE without it"
            )
    activation = text(config, "activation", where) or "topk"
    if activation != "topk":
        raise SaeError(f"{where} has activation = '{activation}', which is not supported; expected 'topk'")
    check_known(config, (*_UNSUPPORTED, *_READ, *_TRAINING), where)
    transcodes, skip = flag(config, "transcode", where, False), flag(config, "skip_connection", where, False)
    if skip and not transcodes:
        raise SaeError(f"{where} has skip_connection = True without transcode: an autoencoder that is given its answer")
    names = _TENSORS | ({"W_skip": "W_skip"} if skip else {})
    architecture = "topk" if not transcodes else "topk_skip_transcoder" if skip else "topk_transcoder"
    taken = take(read_safetensors(folder / WEIGHTS_NAME, where), names, (), where)
    d_in, k = integer(config, "d_in", where), integer(config, "k", where)
    chosen = config.get("num_latents", 0) != 0
    d_sae = integer(config, "num_latents", where) if chosen else d_in * integer(config, "expansion_factor", where, 32)
    check_tensors(architecture, taken, (d_in, d_sae, d_in), where, CONFIG_NAME)
    check_top_k(k, d_sae, where)
    hook_point, target = _hook_points(config, folder.name, transcodes, where)
    metadata = {"hook_name_out": target} if target else {}
    own = {"k": k, "apply_b_dec_to_input": not transcodes}
    return SaeParts(architecture, taken, hook_point, own, metadata)


def _hook_points(config: dict[str, Any], folder: str, transcodes: bool, where: str) -> tuple[str, str]:
    """Return what is read and, of a transcoder, written: `hook_name`s, or else what the folder's name says.

    A module's name stands for its output, and for a transcoder's input and output. A block's output is `resid_post`.
    """
    hook_point, target = text(config, "hook_name", where), text(config, "hook_name_out", where)
    if hook_point:
        return canonical_hook_point(hook_point), canonical_hook_point(target or "")
    if transcodes:
        mlp = _MLP.fullmatch(folder)
        return (f"blocks.{int(mlp[1])}.mlp_in", f"blocks.{int(mlp[1])}.mlp_out") if mlp else ("", "")
    block = _BLOCK.fullmatch(folder)
    if block:
        return f"blocks.{int(block[1])}.resid_post", ""
    return (folder if _MODULE_PATH.fullmatch(folder) else ""), ""


def write(parts: SaeParts, folder: Path) -> None:
    """Write a TopK SAE or transcoder as `SparseCoder.load_from_disk` reads it.

    Raises:
        SaeError: sparsify has no such kind.
    """
    parts = split_signs(parts)
    kind = require(parts, "sparsify", ("topk",), ("sae", "transcoder", "skip"))
    transcodes = kind.wiring == "transcoder"
    parts = subtracting_b_dec(parts, not transcodes)
    tensors = {name: float32_copy(tensor) for name, tensor in parts.tensors.items()}
    d_in, d_sae = tensors["W_enc"].shape
    if tensors["W_dec"].shape[1] != d_in:
        raise SaeError(f"sparsify's transcoders write as many channels as they read; this one reads {d_in}")
    norms = tensors["W_dec"].norm(dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(d_sae // d_in, 1),
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4)),
        "num_latents": d_sae,
        "k": int(parts.config["k"]),
        "multi_topk": False,
        "skip_connection": kind.skip,
        "transcode": transcodes,
        "d_in": d_in,
    }
    if parts.hook_point:
        found = block_and_kind(parts.hook_point)
        config |= {"hook_name": parts.hook_point} | ({"hook_layer": found[0]} if found else {})
    if transcodes and parts.metadata.get("hook_name_out"):
        config["hook_name_out"] = parts.metadata["hook_name_out"]
    saved = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if kind.skip:
        saved["W_skip"] = tensors["W_skip"]
    with replacing(folder / WEIGHTS_NAME) as partial:
        save_file(saved, partial, metadata={"format": "pt"})
    write_file(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


FORMAT = SaeFormat(
    "sparsify", f"{CONFIG_NAME} and {WEIGHTS_NAME}", folders(recognises), read, write, CONFIG_NAME, weights_name
)
