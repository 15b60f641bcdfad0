"""SAEs on disk: SAELens v6's `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...core.disk import replacing, write_file
from ...core.paths import user_path
from ...core.version import thresher_version
from .kinds import find_kind

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
DIVERGED_NAME = "diverged.json"
"""The file that `thresher train` writes in the folder of an SAE that diverged, instead of weights."""
SAELENS_VERSION = "6.0.0"
"""The oldest SAELens whose reader takes these files as they are."""

_SAELENS_KINDS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
    "mlp_branch": "hook_mlp_in",
    "mlp_in_normalized": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",  # of TransformerLens's bridge, and of SAELens's models; fold_ln = False keeps its values
    "mlp_out": "hook_mlp_out",
}


def saelens_hook_name(hook_point: str) -> str:
    """Return SAELens's spelling of a canonical hook point, `blocks.2.hook_resid_post`; others are unchanged."""
    block, dot, kind = hook_point.rpartition(".")
    return block + dot + _SAELENS_KINDS[kind] if kind in _SAELENS_KINDS else hook_point


def write_folder(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each atomically and the configuration last, so that a folder with it is complete.

    Raises:
        DiskSpaceError, OutputError: the disk refuses them.
    """
    folder = user_path(path)
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    with replacing(folder / WEIGHTS_NAME) as partial:
        save_file(plain, partial, metadata={"format": "pt"})
    write_file(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def _model_options(hook_point: str) -> dict[str, Any]:
    """Return how SAELens must load the model for its hook to give these activations.

    The weight and bias of a norm are part of the MLP's input, so they must not be folded into the MLP.
    """
    return {"model_from_pretrained_kwargs": {"fold_ln": False}} if hook_point.endswith(".mlp_in") else {}


def saelens_config(
    architecture: str, d_in: int, d_sae: int, hook_point: str, config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of `cfg.json`; `config` gives the architecture's own keys."""
    kind = find_kind(architecture)
    own = {key: config[key] for key in kind.keys if key in config}
    if kind.chooses_k:
        own["rescale_acts_by_decoder_norm"] = False
    hook_name = saelens_hook_name(hook_point)
    by_head = hook_name.endswith("hook_z") or config.get("reshape_activations") == "hook_z"
    return {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        **own,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", kind.wiring != "transcoder")),
        "normalize_activations": str(config.get("normalize_activations") or "none"),
        # SAELens runs SAEs on the heads side by side, where it hooks them as [.., heads, d_head].
        "reshape_activations": "hook_z" if by_head and kind.wiring == "sae" else "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "hook_name": hook_name,
            **_model_options(hook_point),
            **metadata,
            "thresher": {"version": thresher_version(), "hook_point": hook_point, "config": dict(config)},
        },
    }
