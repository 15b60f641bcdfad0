"""Read trained SAEs to start from: ours, SAELens's, sparsify's and dictionary_learning's, without their libraries.

Pickles are refused, for reading one can run whatever code it names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..shared.errors import MissingFileError, SaeError
from ..shared.paths import user_path
from ..shared.sae import Sae
from ..shared.sae.files import CONFIG_NAME, WEIGHTS_NAME

_SPARSIFY_NAME = "sae.safetensors"
_DICTIONARY_NAME, _DICTIONARY_CONFIG = "ae.safetensors", "config.json"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def read_trained_sae(path: str | Path, name: str | None = None) -> Sae:
    """Return the SAE in a folder, or in its sub-folder `name`, as one that takes raw activations.

    Raises:
        MissingFileError: there is none.
        SaeError: it is a pickle, damaged, or of a kind that cannot be trained here.
    """
    folder = user_path(path)
    if not _is_sae(folder) and name is not None and _is_sae(folder / name):
        folder = folder / name
    if (folder / WEIGHTS_NAME).is_file():
        return Sae.load(folder)
    if (folder / _SPARSIFY_NAME).is_file():
        return _from_sparsify(*_read(folder, CONFIG_NAME, _SPARSIFY_NAME), folder)
    if (folder / _DICTIONARY_NAME).is_file():
        return _from_dictionary_learning(*_read(folder, _DICTIONARY_CONFIG, _DICTIONARY_NAME), folder)
    pickles = [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
    for file in pickles:
        if file.suffix in _PICKLES:
            raise SaeError(
                f"'{file}' is a pickle, which may run code when read; expected safetensors: where you trust it, save "
                f"torch.load(..., weights_only=True) with safetensors.torch.save_file as '{_DICTIONARY_NAME}' beside "
                f"{_DICTIONARY_CONFIG}"
            )
    beside = f" nor in its folder '{name}'" if name is not None else ""
    raise MissingFileError(
        f"no SAE to start from at '{path}'{beside}; expected {WEIGHTS_NAME} (ours, SAELens), {_SPARSIFY_NAME} "
        f"(sparsify) or {_DICTIONARY_NAME} (dictionary_learning) and its configuration"
    )


def _is_sae(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (WEIGHTS_NAME, _SPARSIFY_NAME, _DICTIONARY_NAME))


def _read(folder: Path, config_name: str, weights_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / config_name).read_text(encoding="utf-8"))
        tensors = load_file(folder / weights_name)
    except FileNotFoundError:
        raise MissingFileError(f"'{folder}' has {weights_name} but no {config_name}; copy it there") from None
    except (ValueError, SafetensorError) as error:
        raise SaeError(f"SAE at '{folder}' is damaged: {error}") from None
    return config, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _take(tensors: Mapping[str, Tensor], names: Mapping[str, str], folder: Path) -> dict[str, Tensor]:
    """Return our tensors from others' names; a name that ends in `.T` is transposed."""
    taken = {}
    for ours, theirs in names.items():
        if theirs.removesuffix(".T") not in tensors:
            raise SaeError(f"SAE at '{folder}' is damaged: its weights lack {theirs.removesuffix('.T')}")
        tensor = tensors[theirs.removesuffix(".T")]
        taken[ours] = (tensor.T if theirs.endswith(".T") else tensor).contiguous()
    return taken


def _from_sparsify(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Sae:
    """Read eai-sparsify's `cfg.json` and `sae.safetensors`: a TopK SAE."""
    unlike = [key for key in ("transcode", "skip_connection") if config.get(key)]
    if config.get("activation", "topk") != "topk":
        unlike.append(f"activation = '{config['activation']}'")
    if unlike:
        raise SaeError(f"SAE at '{folder}' has {unlike[0]}, which no architecture here has; expected a TopK SAE")
    names = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    return Sae("topk", _take(tensors, names, folder), config={"k": int(config.get("k", 0))})


_LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
_DICTIONARIES: dict[str, tuple[str, dict[str, str], bool]] = {
    "AutoEncoder": ("standard", _LINEAR | {"b_dec": "bias"}, True),
    "AutoEncoderNew": ("standard", _LINEAR | {"b_dec": "decoder.bias"}, False),
    "GatedAutoEncoder": ("gated", {"W_enc": _LINEAR["W_enc"], "W_dec": _LINEAR["W_dec"]} | _GATED, True),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold": "threshold"}, False),
    "AutoEncoderTopK": ("topk", _LINEAR, True),
    "BatchTopKSAE": ("jumprelu", _LINEAR | {"threshold": "threshold"}, True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", _PLAIN | {"threshold": "threshold"}, True),
}
"""dictionary_learning's classes: our architecture, our tensors by their names, and whether encoders subtract b_dec."""


def _from_dictionary_learning(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Sae:
    """Read dictionary_learning's `config.json` and a state dict of it that was saved again as `ae.safetensors`."""
    kind = dict(config.get("trainer") or {}).get("dict_class")
    if kind not in _DICTIONARIES:
        raise SaeError(
            f"SAE at '{folder}' is dictionary_learning's class '{kind}'; expected one of: {', '.join(_DICTIONARIES)}"
        )
    architecture, names, subtracts = _DICTIONARIES[kind]
    taken = _take(tensors, names, folder)
    if "threshold" in taken:
        taken["threshold"] = taken["threshold"].clamp_min(0).expand(taken["W_dec"].shape[0]).clone()
    own: dict[str, Any] = {"apply_b_dec_to_input": subtracts}
    if architecture == "topk":
        own["k"] = int(tensors["k"]) if "k" in tensors else int(config["trainer"].get("k", 0))
    return Sae(architecture, taken, config=own)
