"""sparsify's SAEs: `cfg.json` and `sae.safetensors`, TopK with `b_dec` subtracted from the input."""

from __future__ import annotations

import re
from pathlib import Path

from ...core.errors import SaeError
from ...model.hook_points import canonical_hook_point
from .parts import SaeParts, check_known, check_tensors, check_top_k, integer, take, text
from .reading import read_json, read_safetensors

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"

_UNSUPPORTED = ("transcode", "skip_connection", "signed")
_TENSORS = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_READ = ("activation", "expansion_factor", "num_latents", "k", "d_in", "hook_name")
_TRAINING = ("normalize_decoder", "multi_topk", "hook_layer")
"""Settings that change how an SAE is trained, or where, not what it computes."""

_MODULE_PATH = re.compile(r"([a-z_]+\.)*(layers|h|blocks)\.\d+(\.[a-z_0-9]+)*")


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
    taken = take(read_safetensors(folder / WEIGHTS_NAME, where), _TENSORS, (), where)
    d_in, k = integer(config, "d_in", where), integer(config, "k", where)
    chosen = config.get("num_latents", 0) != 0
    d_sae = integer(config, "num_latents", where) if chosen else d_in * integer(config, "expansion_factor", where, 32)
    check_tensors("topk", taken, (d_in, d_sae, d_in), where, CONFIG_NAME)
    check_top_k(k, d_sae, where)
    hook_point = text(config, "hook_name", where) or (folder.name if _MODULE_PATH.fullmatch(folder.name) else "")
    return SaeParts("topk", taken, canonical_hook_point(hook_point), {"k": k, "apply_b_dec_to_input": True})
