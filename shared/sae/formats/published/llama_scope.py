"""Llama Scope (Llama 3.1 8B) and its R1 distillation: `encoder.weight`, with norm factors apart (arXiv 2410.20526).

The first has `hyperparams.json` and `checkpoints/final.safetensors`, the second `config.json` and
`sae_weights.safetensors`. SAEs read `x sqrt(d) / norm_in` and write `y sqrt(d) / norm_out`, where the norms are
averages over the data: they differ by 10 to 19 times in transcoders, so that one factor for both would be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....core.errors import SaeError
from ....model.hook_points import canonical_hook_point
from ..format import SaeFormat
from ..kinds import Kind
from ..parts import SaeParts, check_known, check_tensors, encoder_shape, flag, mapping, take, text
from ..reading import read_json, read_safetensors
from .norm_factors import fold_norms, positive, weighted_threshold

_OLD, _NEW = "hyperparams.json", "config.json"
_TENSORS = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}
_READ = (
    *("d_model", "d_sae", "expansion_factor", "hook_point_in", "hook_point_out", "norm_activation"),
    *("dataset_average_activation_norm", "jump_relu_threshold", "apply_decoder_bias_to_pre_encoder", "act_fn"),
    *("activation_fn", "use_decoder_bias", "use_glu_encoder", "sparsity_include_decoder_norm", "top_k", "k"),
)
_IGNORED = (
    *("device", "dtype", "seed", "strict_loading", "use_ghost_grads", "sae_pretrained_name_or_path", "remove_gradient"),
    *("remove_gradient_parallel_to_decoder_directions", "decoder_exactly_fixed_norm", "decoder_bias_init_method"),
    *("use_batch_norm_mse", "init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose"),
    *("init_encoder_with_decoder_transpose_factor", "init_search", "l1_coefficient", "l1_coefficient_warmup_steps"),
    *("lp", "lp_coefficient", "sparsity_coefficient", "sae_type", "jumprelu_threshold_window", "model_name"),
    *("jump_relu_threshold_window", "use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel"),
    *("noise_scale", "k_warmup_steps", "use_batch_topk"),
)
"""What training needed, and where it ran."""


def _find(path: Path) -> list[Path]:
    if (path / _OLD).is_file() and (path / "checkpoints" / "final.safetensors").is_file():
        return [path]
    file = path / "sae_weights.safetensors"
    return [path] if (path / _NEW).is_file() and file.is_file() and _is_linear(file) else []


def _is_linear(path: Path) -> bool:
    """Return whether the weights have the names of this format, from the file's header alone."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return b'"encoder.weight"' in file.read(min(size, 1 << 20))


def read(folder: Path) -> SaeParts:
    """Read an SAE or transcoder, with its norm factors folded into the weights.

    Raises:
        SaeError: it is damaged, or has a setting that changes what it computes and is not known.
    """
    where = f"SAE at '{folder}'"
    old = (folder / _OLD).is_file()
    config = read_json(folder / (_OLD if old else _NEW), where)
    check_known(config, (*_READ, *_IGNORED), where)
    if flag(config, "apply_decoder_bias_to_pre_encoder", where, False) or flag(config, "use_glu_encoder", where, False):
        raise SaeError(f"{where} subtracts its decoder's bias or has a gated linear encoder, which is not supported")
    if not flag(config, "use_decoder_bias", where, True):
        raise SaeError(f"{where} has use_decoder_bias = False, which is not supported")
    activation = text(config, "act_fn", where) or text(config, "activation_fn", where) or "jumprelu"
    if activation.lower() != "jumprelu":
        raise SaeError(f"{where} has the activation '{activation}', expected 'jumprelu'")
    path = folder / "checkpoints" / "final.safetensors" if old else folder / "sae_weights.safetensors"
    tensors = read_safetensors(path, where)
    names = _TENSORS | ({} if old else {"threshold": "log_jumprelu_threshold"})
    norms_inside = [name for name in tensors if name.startswith("dataset_average_activation_norm.")]
    taken = {name: tensor.float() for name, tensor in take(tensors, names, norms_inside, where).items()}
    if old:
        threshold = positive(config.get("jump_relu_threshold"), f"{where} has jump_relu_threshold")
        taken["threshold"] = torch.full((taken["W_enc"].shape[-1],), threshold)
    else:
        taken["threshold"] = taken["threshold"].exp()
    reads, writes = (text(config, key, where) or "" for key in ("hook_point_in", "hook_point_out"))
    writes = writes or reads
    transcodes = writes != reads
    kind = Kind("jumprelu", "transcoder" if transcodes else "sae")
    d_in, d_sae = encoder_shape(taken)
    check_tensors(kind.name, taken, (d_in, d_sae, taken["W_dec"].shape[-1]), where, "encoder.weight")
    if flag(config, "sparsity_include_decoder_norm", where, not old):
        taken["threshold"] = weighted_threshold(taken["threshold"], taken["W_dec"])
    taken, folded = fold_norms(taken, _norms(config, tensors, (reads, writes), where), raw_threshold=old)
    metadata: dict[str, Any] = {"model_name": "meta-llama/Llama-3.1-8B"} if "llama" in str(folder).lower() else {}
    if transcodes:
        metadata["hook_name_out"] = canonical_hook_point(writes)
    own = {"apply_b_dec_to_input": False}
    return SaeParts(kind.name, taken, canonical_hook_point(reads), own, metadata, folded)


def _norms(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hooks: tuple[str, str], where: str
) -> tuple[float, float] | None:
    """Return the data's average norms at what is read and written, or None where rows are taken as they are."""
    kind = text(config, "norm_activation", where) or "inference"
    if kind == "inference":
        return None
    if kind != "dataset-wise":
        raise SaeError(f"{where} has norm_activation '{kind}', expected 'dataset-wise' or 'inference'")
    given = mapping(config, "dataset_average_activation_norm", where)
    found = []
    for end, hook in zip(("in", "out"), hooks, strict=True):
        inside = tensors.get(f"dataset_average_activation_norm.{hook}")
        value = float(inside) if inside is not None and inside.numel() == 1 else given.get(end, given.get(hook))
        found.append(positive(value, f"{where} has dataset_average_activation_norm of '{end}'"))
    return found[0], found[1]


FORMAT = SaeFormat("llama-scope", f"{_OLD} and checkpoints/final.safetensors", _find, read)
