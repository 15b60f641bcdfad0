"""dictionary_learning's SAEs: `config.json` and `ae.pt`, or the same tensors as `ae.safetensors`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from ...core.disk import write_file
from ...core.errors import SaeError
from ...model.hook_points import block_and_kind
from .folding import float32_copy, require, split_signs, subtracting_b_dec, subtracts_b_dec
from .format import SaeFormat, folders
from .parts import SaeParts, check_known, check_tensors, check_top_k, integer, mapping, take, text
from .reading import read_json, read_safetensors, read_torch_archive

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "ae.safetensors"
ARCHIVE_NAME = "ae.pt"


@dataclass(frozen=True)
class _Kind:
    """One of the library's classes: our architecture, our tensors by its names, and whether encoders subtract b_dec.

    `others` are tensors that what it computes does not need.
    """

    architecture: str
    names: dict[str, str]
    subtracts: bool = True
    others: tuple[str, ...] = ()


_LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
_THRESHOLD = {"threshold": "threshold"}
_KINDS = {
    "AutoEncoder": _Kind("standard", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Kind("standard", _LINEAR | {"b_dec": "decoder.bias"}, subtracts=False),
    "GatedAutoEncoder": _Kind("gated", {"W_enc": _LINEAR["W_enc"], "W_dec": _LINEAR["W_dec"]} | _GATED),
    "JumpReluAutoEncoder": _Kind("jumprelu", _PLAIN | _THRESHOLD, subtracts=False),
    "AutoEncoderTopK": _Kind("topk", _LINEAR, others=("k", "threshold")),
    "BatchTopKSAE": _Kind("jumprelu", _LINEAR | _THRESHOLD, others=("k",)),
    "MatryoshkaBatchTopKSAE": _Kind("jumprelu", _PLAIN | _THRESHOLD, others=("k", "group_sizes")),
}

_TRAINER_KEYS = (
    "trainer_class",
    "dict_class",
    "activation_dim",
    "dict_size",
    "k",
    "layer",
    "lm_name",
    "submodule_name",
    "wandb_name",
    "device",
    "seed",
    "steps",
    "lr",
    "warmup_steps",
    "decay_start",
    "resample_steps",
    "sparsity_warmup_steps",
    "sparsity_function",
    "sparsity_penalty",
    "sparsity_queue_length",
    "n_sparsity_updates",
    "l1_penalty",
    "initial_sparsity_penalty",
    "p_start",
    "p_end",
    "anneal_start",
    "anneal_end",
    "bandwidth",
    "target_l0",
    "auxk_alpha",
    "top_k_aux",
    "threshold_beta",
    "threshold_start_step",
    "group_fractions",
    "group_weights",
    "group_sizes",
    "norm_factor",
    "run_name",
    "ortho_weight",
    "dead_tokens",
    "dead_feature_threshold",
)
"""What the library's trainers write, and some derived from them. `norm_factor` is in the saved biases already."""

_BUFFER_KEYS = ("d_submodule", "io", "n_ctxs", "ctx_len", "refresh_batch_size", "out_batch_size", "device", "layer")
_RESIDUAL_STREAM = re.compile(r"resid_post_layer_(\d+)")


def recognises(folder: Path) -> bool:
    """Return whether a folder has this format's weights; `torch.save` writes zip files."""
    return (folder / WEIGHTS_NAME).is_file() or is_zipfile(folder / ARCHIVE_NAME)


def weights_name(folder: Path) -> str:
    """Return the name of a folder's weights: safetensors where there are both."""
    return WEIGHTS_NAME if (folder / WEIGHTS_NAME).is_file() else ARCHIVE_NAME


def read(folder: Path) -> SaeParts:
    """Read an SAE of any of the library's classes. `ae.pt` is read without running code that it names.

    Raises:
        SaeError: it is damaged, or of a class or a setting that is not known.
    """
    where = f"SAE at '{folder}'"
    config = read_json(folder / CONFIG_NAME, where)
    trainer, buffer = mapping(config, "trainer", where), mapping(config, "buffer", where)
    name = text(trainer, "dict_class", where)
    if name not in _KINDS:
        raise SaeError(f"{where} is dictionary_learning's class '{name}'; expected one of: {', '.join(_KINDS)}")
    check_known(config, ("trainer", "buffer"), where)
    check_known(trainer, _TRAINER_KEYS, where)
    check_known(buffer, _BUFFER_KEYS, where)
    if buffer.get("io") == "in_and_out":
        raise SaeError(f"{where} maps a module's input to its output (io = 'in_and_out'); expected an autoencoder")
    kind, path = _KINDS[name], folder / weights_name(folder)
    tensors = (read_safetensors if path.name == WEIGHTS_NAME else read_torch_archive)(path, where)
    taken = take(tensors, kind.names, kind.others, where)
    if "threshold" in taken and taken["threshold"].numel() == 1:
        taken["threshold"] = taken["threshold"].reshape(()).expand(len(taken["W_dec"])).clone()
    d_in, d_sae = _sizes(trainer, taken["W_enc"], where)
    check_tensors(kind.architecture, taken, (d_in, d_sae, d_in), where, CONFIG_NAME)
    own: dict[str, Any] = {"apply_b_dec_to_input": kind.subtracts}
    if "k" in kind.others:
        own["k"] = _k(trainer, tensors, where)
        check_top_k(own["k"], d_sae, where)
    metadata = {"model_name": model} if (model := text(trainer, "lm_name", where)) else {}
    place = _RESIDUAL_STREAM.fullmatch(text(trainer, "submodule_name", where) or "")
    hook_point = f"blocks.{int(place[1])}.resid_post" if place else ""
    return SaeParts(kind.architecture, taken, hook_point, own, metadata)


def _sizes(trainer: Mapping[str, Any], W_enc: Tensor, where: str) -> tuple[int, int]:
    """Return d_in and d_sae, which old files leave to the weights."""
    if W_enc.ndim != 2:
        raise SaeError(f"{where} is damaged: its encoder has {W_enc.ndim} dimensions, expected 2")
    d_in, d_sae = W_enc.shape
    return integer(trainer, "activation_dim", where, d_in), integer(trainer, "dict_size", where, d_sae)


def _k(trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> int:
    """Return k, which the configuration and the weights must agree on."""
    saved = tensors.get("k")
    if saved is None:
        return integer(trainer, "k", where)
    if saved.numel() != 1 or saved.dtype not in (torch.int32, torch.int64):
        raise SaeError(f"{where} is damaged: its tensor k is not one whole number")
    k = integer(trainer, "k", where, int(saved))
    if k != int(saved):
        raise SaeError(f"{where} is damaged: k is {k} in {CONFIG_NAME} and {int(saved)} in the weights")
    return k


_WRITTEN = {"gated": "GatedAutoEncoder", "jumprelu": "JumpReluAutoEncoder", "topk": "AutoEncoderTopK"}
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
}


def write(parts: SaeParts, folder: Path) -> None:
    """Write an SAE as the library's `load_dictionary` reads it.

    Raises:
        SaeError: it is not an autoencoder.
    """
    parts = split_signs(parts)
    kind = require(parts, "dictionary_learning", ("standard", "gated", "jumprelu", "topk"), ("sae",))
    name = _WRITTEN.get(kind.selection) or ("AutoEncoder" if subtracts_b_dec(parts) else "AutoEncoderNew")
    theirs = _KINDS[name]
    parts = subtracting_b_dec(parts, theirs.subtracts)
    state = {}
    for ours, named in theirs.names.items():
        tensor = float32_copy(parts.tensors[ours])
        state[named.removesuffix(".T")] = tensor.T.contiguous() if named.endswith(".T") else tensor
    d_in, d_sae = parts.tensors["W_enc"].shape
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[name],
        "dict_class": name,
        "activation_dim": d_in,
        "dict_size": d_sae,
    }
    if kind.selection == "topk":
        k = int(parts.config["k"])
        trainer["k"] = k
        state |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    place = block_and_kind(parts.hook_point)
    if place is not None:
        trainer["layer"] = place[0]
        trainer |= {"submodule_name": f"resid_post_layer_{place[0]}"} if place[1] == "resid_post" else {}
    if parts.metadata.get("model_name"):
        trainer["lm_name"] = parts.metadata["model_name"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(folder / ARCHIVE_NAME, buffer.getvalue())
    config = {"trainer": trainer, "buffer": {"d_submodule": d_in, "io": "out"}}
    write_file(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def _find(path: Path) -> list[Path]:
    folder = path.parent if path.name == ARCHIVE_NAME and path.is_file() else path
    return folders(recognises)(folder)


FORMAT = SaeFormat(
    "dictionary_learning",
    f"{CONFIG_NAME} and {ARCHIVE_NAME} or {WEIGHTS_NAME}",
    _find,
    read,
    write,
    CONFIG_NAME,
    weights_name,
)
