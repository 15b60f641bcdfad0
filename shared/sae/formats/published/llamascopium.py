"""Language-Model-SAEs (Llamascopium 2) and Llama Scope 2: `config.json` and `sae_weights.safetensors` with `W_E`.

SAEs and transcoders have `sae_type` sae, and cross-layer transcoders clt: `W_D.m`, `[m + 1, d_sae, d_out]`, is what
layer m receives. `b_D` is not subtracted from the input. With `sparsity_include_decoder_norm` latents fire by
their size times their decoder's norm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ....core.disk import replacing, write_file
from ....core.errors import SaeError
from ....model.hook_points import canonical_hook_point
from ..cross_layer import ARCHITECTURE as CROSS_LAYER
from ..cross_layer import check_cross_layer
from ..files import saelens_hook_name
from ..folding import float32_copy, normalizes_rows, require, split_signs, subtracting_b_dec
from ..format import SaeFormat
from ..kinds import Kind
from ..parts import SaeParts, check_known, check_tensors, check_top_k, encoder_shape, flag, integer, take, text
from ..reading import read_json, read_safetensors
from .norm_factors import TOKEN_WISE, fold_norms, positive, token_wise, weighted_threshold

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "sae_weights.safetensors"

_NORM = "dataset_average_activation_norm."
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_READ = (
    *("sae_type", "d_model", "expansion_factor", "use_decoder_bias", "act_fn", "norm_activation", "top_k"),
    *("sparsity_include_decoder_norm", "hook_point_in", "hook_point_out", "use_glu_encoder"),
    *("hook_points_in", "hook_points_out"),
)
_IGNORED = (
    *("use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel", "jumprelu_threshold_window", "dtype", "device"),
    *("init_cross_layer_decoder_all_zero", "decode_with_csr", "sparsity_threshold_for_csr"),
)
_SELECTIONS = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}


def _find(path: Path) -> list[Path]:
    if not ((path / CONFIG_NAME).is_file() and (path / WEIGHTS_NAME).is_file()):
        return []
    try:
        return [path] if "sae_type" in read_json(path / CONFIG_NAME, "") else []
    except SaeError:
        return []


def read(folder: Path) -> SaeParts:
    """Read an SAE, transcoder or cross-layer transcoder, with its norm factors folded into the weights.

    Raises:
        SaeError: it is damaged, or computes something that this version cannot.
    """
    where = f"SAE at '{folder}'"
    config = read_json(folder / CONFIG_NAME, where)
    check_known(config, (*_READ, *_IGNORED), where)
    kind = text(config, "sae_type", where)
    if kind not in ("sae", "clt"):
        raise SaeError(f"{where} has sae_type '{kind}', expected 'sae' or 'clt'")
    activation = text(config, "act_fn", where) or "relu"
    if activation not in _SELECTIONS:
        raise SaeError(
            f"{where} has act_fn '{activation}', which chooses among the rows of a batch; expected one of: "
            f"{', '.join(_SELECTIONS)}"
        )
    if flag(config, "use_glu_encoder", where, False):
        raise SaeError(f"{where} has use_glu_encoder = True, which is not supported")
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in read_safetensors(folder / WEIGHTS_NAME, where).items()
    }
    if kind == "clt":
        return _read_cross_layer(config, tensors, activation, where)
    return _read_sae(config, tensors, _SELECTIONS[activation], where)


def _read_sae(config: Mapping[str, Any], tensors: dict[str, Tensor], selection: str, where: str) -> SaeParts:
    hooks = [text(config, key, where) or "" for key in ("hook_point_in", "hook_point_out")]
    if not all(hooks):
        raise SaeError(f"{where} lacks hook_point_in or hook_point_out in {CONFIG_NAME}")
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D"}
    names |= {"threshold": _LOG_THRESHOLD} if selection == "jumprelu" else {}
    biased = flag(config, "use_decoder_bias", where, True)
    names |= {"b_dec": "b_D"} if biased else {}
    taken = take(tensors, names, [name for name in tensors if name.startswith(_NORM)], where)
    if not biased:
        taken["b_dec"] = torch.zeros(taken["W_dec"].shape[-1])
    if "threshold" in taken:
        taken["threshold"] = taken["threshold"].exp()
    transcodes = hooks[0] != hooks[1]
    kind = Kind(selection, "transcoder" if transcodes else "sae")
    d_in, d_sae = encoder_shape(taken)
    check_tensors(kind.name, taken, (d_in, d_sae, taken["W_dec"].shape[-1]), where, "W_E")
    own: dict[str, Any] = {"apply_b_dec_to_input": False}
    folded: tuple[str, ...] = ()
    weighed = flag(config, "sparsity_include_decoder_norm", where, True)
    if selection == "topk":
        own["k"] = integer(config, "top_k", where)
        check_top_k(own["k"], d_sae, where)
        if weighed:
            norms = taken["W_dec"].norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            taken |= {"W_enc": taken["W_enc"] * norms, "b_enc": taken["b_enc"] * norms}
            taken["W_dec"] = taken["W_dec"] / norms[:, None]
            folded = ("the decoders' norms, by which latents are weighed before the k largest are taken, into W_enc",)
    elif weighed and selection == "jumprelu":
        taken["threshold"] = weighted_threshold(taken["threshold"], taken["W_dec"])
        folded = ("the decoders' norms, by which latents are weighed before a threshold, into the thresholds",)
    if text(config, "norm_activation", where) == "token-wise":
        own["normalize_activations"] = token_wise(hooks[0], hooks[1], where)
        scaled: tuple[str, ...] = ()
    else:
        taken, scaled = fold_norms(taken, _norms(config, tensors, hooks, where))
    metadata = {"hook_name_out": canonical_hook_point(hooks[1])} if transcodes else {}
    return SaeParts(kind.name, taken, canonical_hook_point(hooks[0]), own, metadata, folded + scaled)


def _norms(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hooks: list[str], where: str
) -> tuple[float, float] | None:
    kind = text(config, "norm_activation", where) or "dataset-wise"
    if kind == "inference":
        return None
    if kind != "dataset-wise":
        raise SaeError(
            f"{where} has norm_activation '{kind}', which scales by the norms of a batch, or of each token in a "
            "cross-layer transcoder; expected 'dataset-wise' or 'inference', or 'token-wise' of an autoencoder"
        )
    found = []
    for hook in hooks:
        tensor = tensors.get(_NORM + hook)
        value = float(tensor) if tensor is not None and tensor.numel() == 1 else None
        found.append(positive(value, f"{where} has {_NORM}{hook}"))
    return found[0], found[1]


def _read_cross_layer(config: Mapping[str, Any], tensors: dict[str, Tensor], activation: str, where: str) -> SaeParts:
    hooks = [config.get(key) for key in ("hook_points_in", "hook_points_out")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in hooks):
        raise SaeError(f"{where} lacks the lists hook_points_in or hook_points_out in {CONFIG_NAME}")
    reads, writes = hooks[0] or [], hooks[1] or []
    n = len(reads)
    if not n or len(writes) != n or activation == "topk":
        raise SaeError(
            f"{where} has {n} hook_points_in, {len(writes)} hook_points_out and act_fn '{activation}'; expected as "
            "many of both, and relu or jumprelu"
        )
    names = {name: name for name in ("W_E", "b_E", *(f"{p}.{i}" for p in ("W_D", "b_D") for i in range(n)))}
    names |= {_LOG_THRESHOLD: _LOG_THRESHOLD} if activation == "jumprelu" else {}
    taken = take(tensors, names, [name for name in tensors if name.startswith(_NORM)], where)
    W_E, b_E = taken["W_E"], taken["b_E"]
    if W_E.ndim != 3 or len(W_E) != n or b_E.shape != (n, W_E.shape[2]):
        raise SaeError(f"{where} is damaged: W_E has shape {tuple(W_E.shape)}, expected [{n}, d_model, d_sae]")
    _, d_in, d_sae = W_E.shape
    d_out = taken["b_D.0"].shape[0]
    for m in range(n):
        if tuple(taken[f"W_D.{m}"].shape) != (m + 1, d_sae, d_out):
            raise SaeError(f"{where} is damaged: W_D.{m} has another shape than [{m + 1}, {d_sae}, {d_out}]")
    own: dict[str, Tensor] = {}
    factors = [_norms(config, tensors, [reads[i], writes[i]], where) for i in range(n)]
    s_in = [d_in**0.5 / norms[0] if norms else 1.0 for norms in factors]
    s_out = [d_out**0.5 / norms[1] if norms else 1.0 for norms in factors]
    weighed = flag(config, "sparsity_include_decoder_norm", where, True)
    for i in range(n):
        raw = torch.stack([taken[f"W_D.{m}"][i] for m in range(i, n)], dim=1)
        own |= {f"W_enc_{i}": (W_E[i] * s_in[i]).T, f"b_enc_{i}": b_E[i], f"b_dec_{i}": taken[f"b_D.{i}"] / s_out[i]}
        own[f"W_dec_{i}"] = raw / torch.tensor(s_out[i:])[:, None]
        if activation == "jumprelu":
            threshold = taken[_LOG_THRESHOLD][i].exp()
            own[f"threshold_{i}"] = weighted_threshold(threshold, raw) if weighed else threshold
    check_cross_layer(own, (n, d_sae, d_in, d_out), activation, where)
    described = {
        "activation": activation,
        "reads": [canonical_hook_point(name) for name in reads],
        "writes": [canonical_hook_point(name) for name in writes],
    }
    folded = () if factors[0] is None else ("the norm factors of what each layer reads and writes, into its weights",)
    if weighed and activation == "jumprelu":
        folded += ("the decoders' norms, by which latents are weighed before a threshold, into the thresholds",)
    return SaeParts(CROSS_LAYER, own, "", described, {}, folded)


def write(parts: SaeParts, folder: Path) -> None:
    """Write an SAE, transcoder or cross-layer transcoder, whose latents and reconstructions are of activations as is.

    Raises:
        SaeError: the library has no such kind.
        NotExactError: the library chooses latents in another way.
    """
    if parts.architecture == CROSS_LAYER:
        config, saved = _cross_layer_files(parts)
    else:
        config, saved = _sae_files(parts)
    with replacing(folder / WEIGHTS_NAME) as partial:
        save_file(
            {name: float32_copy(tensor) for name, tensor in saved.items()}, partial, metadata={"version": "2.0.0"}
        )
    write_file(folder / CONFIG_NAME, (json.dumps(config, indent=4) + "\n").encode())


def _sae_files(parts: SaeParts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    parts = split_signs(parts)
    kind = require(parts, "llamascopium", ("standard", "jumprelu", "topk"), ("sae", "transcoder"), (TOKEN_WISE,))
    parts = subtracting_b_dec(parts, False)
    tensors = parts.tensors
    d_in, d_sae = tensors["W_enc"].shape
    if tensors["W_dec"].shape[1] != d_in:
        raise SaeError(f"llamascopium's transcoders write as many channels as they read; this one reads {d_in}")
    reads = saelens_hook_name(parts.hook_point)
    writes = saelens_hook_name(str(parts.metadata.get("hook_name_out") or parts.hook_point))
    if not reads or (kind.wiring == "transcoder") != (reads != writes):
        raise SaeError("llamascopium needs the hook points that an SAE reads and writes; set hook_point first")
    activation = {"standard": "relu"}.get(kind.selection, kind.selection)
    config = _config("sae", d_in, d_sae, activation, parts.config.get("k"))
    if normalizes_rows(parts):
        if kind.wiring == "transcoder":
            raise SaeError("llamascopium scales a transcoder's output by the norm of its own target; expected 'none'")
        config["norm_activation"] = "token-wise"
    config |= {"hook_point_in": reads, "hook_point_out": writes, "use_glu_encoder": False}
    saved = {"W_E": tensors["W_enc"], "b_E": tensors["b_enc"], "W_D": tensors["W_dec"], "b_D": tensors["b_dec"]}
    if kind.selection == "jumprelu":
        saved[_LOG_THRESHOLD] = _logarithm(tensors["threshold"])
    return config, saved


def _cross_layer_files(parts: SaeParts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    activation = str(parts.config["activation"])
    if activation == "topk" or "W_skip_0" in parts.tensors:
        raise SaeError("llamascopium's cross-layer transcoders are written with relu or jumprelu, without skip paths")
    tensors, n = parts.tensors, len(parts.config["reads"])
    d_sae, d_in = tensors["W_enc_0"].shape
    if len(tensors["b_dec_0"]) != d_in:
        raise SaeError(f"llamascopium's transcoders write as many channels as they read; this one reads {d_in}")
    config = _config("clt", d_in, d_sae, activation, None)
    for key, names in (("hook_points_in", "reads"), ("hook_points_out", "writes")):
        config[key] = [saelens_hook_name(name) for name in parts.config[names]]
    saved = {
        "W_E": torch.stack([tensors[f"W_enc_{i}"].T for i in range(n)]),
        "b_E": torch.stack([tensors[f"b_enc_{i}"] for i in range(n)]),
    }
    for m in range(n):
        saved[f"W_D.{m}"] = torch.stack([tensors[f"W_dec_{i}"][:, m - i] for i in range(m + 1)])
        saved[f"b_D.{m}"] = tensors[f"b_dec_{m}"]
    if activation == "jumprelu":
        saved[_LOG_THRESHOLD] = _logarithm(torch.stack([tensors[f"threshold_{i}"] for i in range(n)]))
    return config, saved


def _config(kind: str, d_in: int, d_sae: int, activation: str, k: object) -> dict[str, Any]:
    return {
        "sae_type": kind,
        "d_model": d_in,
        "expansion_factor": d_sae / d_in,
        "use_decoder_bias": True,
        "act_fn": activation,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "top_k": k if isinstance(k, int) else 50,
    }


def _logarithm(threshold: Tensor) -> Tensor:
    """Return the logarithm of thresholds, with the least positive number in place of those that are not above zero.

    Latents are positive here, so a threshold below zero does as much as zero, and no pre-activation of use is between
    zero and 2e-38.
    """
    return threshold.float().clamp_min(torch.finfo(torch.float32).tiny).log()


FORMAT = SaeFormat("llamascopium", f"{CONFIG_NAME} and {WEIGHTS_NAME}", _find, read, write)
