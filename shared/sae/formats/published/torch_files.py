"""SAEs published as one file of `torch.save`: Qwen Scope, Goodfire, DeepSeek-R1-Distill and OpenAI's of GPT-2.

All are read with `torch.load(weights_only=True)`, which runs no code, and are not written. Which of them a file is
follows from its tensors; where it belongs and, for Qwen Scope, k follow from its path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from torch import Tensor

from ....core.errors import SaeError
from ..format import SaeFormat
from ..parts import SaeParts, check_known, check_tensors, check_top_k, encoder_shape, integer, mapping, take
from ..reading import read_torch_archive

_ENDINGS = (".pt", ".pth")
_OTHERS = ("ae.pt",)
"""What is another format's."""
_QWEN = re.compile(r"SAE-Res-([\w.-]+?)-W(\d+)K-L0_(\d+)")
_QWEN_LAYER = re.compile(r"layer(\d+)\.sae\.pt")
_GOODFIRE = re.compile(r"(Llama-3\.\d-\d+B-Instruct)-SAE-l(\d+)")
_DEEPSEEK = re.compile(r"(DeepSeek-R1-Distill-\w+-\d+B).*?[-_]l(\d+)[-_.]", re.IGNORECASE)

_SQUARE = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"}
_LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}
_GOODFIRE_TENSORS = {ours: theirs.replace("oder.", "oder_linear.") for ours, theirs in _LINEAR.items()}
_OPENAI = {"W_enc": "encoder.weight.T", "b_enc": "latent_bias", "W_dec": "decoder.weight.T", "b_dec": "pre_bias"}
_OPENAI_SITES = {"mlp_post_act": "", "resid_delta_attn": "attn_out", "resid_post_attn": "resid_mid"}
_OPENAI_SITES |= {"resid_delta_mlp": "mlp_out", "resid_post_mlp": "resid_post"}
_OPENAI_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
"""Buffers of training, which change nothing."""


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in _ENDINGS and path.name not in _OTHERS and is_zipfile(path) else []
    if not path.is_dir():
        return []
    files = [file for ending in _ENDINGS for file in path.glob(f"*{ending}")]
    return sorted((file for file in files if _find(file)), key=lambda file: (len(file.name), file.name))


def read(path: Path) -> SaeParts:
    """Read an SAE, without running code that the file names.

    Raises:
        SaeError: it is damaged, holds anything but tensors, or is none of the known kinds.
    """
    where = f"SAE at '{path}'"
    described: dict[str, Any] = {}
    tensors = read_torch_archive(path, where, described)
    names, place = set(tensors), path.absolute().as_posix()
    if "pre_bias" in names:
        return _openai(tensors, described, place, where)
    if described:
        raise SaeError(f"{where} holds '{min(described)}' beside its tensors, which this version does not know")
    if "encoder_linear.weight" in names:
        return _relu(tensors, _GOODFIRE_TENSORS, "meta-llama", _GOODFIRE.search(place), where)
    if names == {"W_enc", "W_dec", "b_enc", "b_dec"}:
        return _qwen(tensors, path, where)
    if "encoder.weight" in names and "decoder.bias" in names:
        return _relu(tensors, _LINEAR, "deepseek-ai", _DEEPSEEK.search(place), where)
    raise SaeError(
        f"{where} has the tensors {', '.join(sorted(names)[:6])}, which are no known format's; expected those of "
        "Qwen Scope, Goodfire, DeepSeek-R1-Distill or OpenAI"
    )


def _checked(architecture: str, taken: dict[str, Tensor], where: str) -> int:
    """Check the shapes and return d_sae."""
    d_in, d_sae = encoder_shape(taken)
    check_tensors(architecture, taken, (d_in, d_sae, d_in), where, "the encoder")
    return d_sae


def _relu(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], owner: str, found: re.Match[str] | None, where: str
) -> SaeParts:
    taken = take(tensors, names, (), where)
    _checked("standard", taken, where)
    metadata = {"model_name": f"{owner}/{found[1]}"} if found else {}
    hook_point = f"blocks.{int(found[2])}.resid_post" if found else ""
    return SaeParts("standard", taken, hook_point, {"apply_b_dec_to_input": False}, metadata)


def _qwen(tensors: Mapping[str, Tensor], path: Path, where: str) -> SaeParts:
    found, layer = _QWEN.search(path.absolute().as_posix()), _QWEN_LAYER.fullmatch(path.name)
    if found is None:
        raise SaeError(
            f"{where} has the tensors of Qwen Scope, whose k is in the name of its repository; expected it in a folder "
            "such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    taken = take(tensors, _SQUARE, (), where)
    d_sae, k = _checked("topk", taken, where), int(found[3])
    check_top_k(k, d_sae, where)
    hook_point = f"blocks.{int(layer[1])}.resid_post" if layer else ""
    metadata: dict[str, Any] = {"model_name": f"Qwen/{found[1]}", "published": {"l0": k}}
    return SaeParts("topk", taken, hook_point, {"k": k, "apply_b_dec_to_input": False}, metadata)


def _openai(tensors: dict[str, Tensor], described: Mapping[str, Any], place: str, where: str) -> SaeParts:
    """Read an SAE of OpenAI's sparse_autoencoder: ReLU, or TopK, which the library takes as a sign of layer_norm."""
    activation, options = described.get("activation", "ReLU"), mapping(described, "activation_state_dict", where)
    if activation not in ("ReLU", "TopK"):
        raise SaeError(f"{where} has activation '{activation}', expected 'ReLU' or 'TopK'")
    check_known(dict(described), ("activation", "activation_state_dict"), where)
    own: dict[str, Any] = {"apply_b_dec_to_input": True}
    architecture = "standard"
    if activation == "TopK":
        check_known(options, ("k", "postact_fn"), where)
        if options.get("postact_fn", "ReLU") != "ReLU":
            raise SaeError(
                f"{where} has postact_fn '{options['postact_fn']}', with which latents may be negative; expected 'ReLU'"
            )
        architecture = "topk"
        own |= {"k": integer(options, "k", where), "normalize_activations": "layer_norm"}
    taken = take(tensors, _OPENAI, _OPENAI_STATISTICS, where)
    d_sae = _checked(architecture, taken, where)
    if activation == "TopK":
        check_top_k(own["k"], d_sae, where)
    site, layer = re.search("|".join(_OPENAI_SITES), place), re.search(r"layer_?(\d+)|/(\d+)\.pt$", place)
    kind = _OPENAI_SITES[site[0]] if site else ""
    number = next((part for part in layer.groups() if part), None) if layer else None
    hook_point = f"blocks.{int(number)}.{kind}" if kind and number else ""
    return SaeParts(architecture, taken, hook_point, own, {"model_name": "gpt2"})


FORMAT = SaeFormat("torch-file", "one .pt or .pth file", _find, read)
