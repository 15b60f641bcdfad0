"""SAELens's SAEs, versions 1 to 6, and Thresher's own: `cfg.json` and `sae_weights.safetensors`.

Before version 6 the hook point, the model and the activation function were keys of the top level, and some settings had
other names and defaults. They are read as SAELens 6 reads them, but what it passes over silently is refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SaeError
from ...model.hook_points import canonical_hook_point
from .files import CONFIG_NAME, WEIGHTS_NAME, saelens_config, write_folder
from .folding import fold_whitening
from .format import SaeFormat, folders
from .kinds import PURSUIT, ROW_NORMALIZATIONS, Kind, find_kind
from .parts import SaeParts, check_known, check_tensors, check_top_k, flag, integer, mapping, text
from .reading import read_json, read_safetensors
from .saelens_keys import METADATA, READ, RENAMED, TRAINING

_DECIDED_ABOVE = ("normalize_activations", "reshape_activations")
"""Keys of the top level that decide what an SAE computes, whatever a note of it in the metadata says."""
_OF_OTHER_FUNCTION = {
    "temporal": "whose latents depend on the tokens before",
    "batchtopk": "a checkpoint of training that SAELens saves as jumprelu when training ends",
    "matryoshka_batchtopk": "a checkpoint of training that SAELens saves as jumprelu when training ends",
}
"""SAELens's architectures that no `Kind` computes, and why."""
_SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
"""Files beside a checkpoint of training, with the factor or the affine map that training folds at its end."""
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def recognises(folder: Path) -> bool:
    """Return whether a folder has this format's weights."""
    return (folder / WEIGHTS_NAME).is_file()


def weights_name(folder: Path) -> str:
    """Return the name of a folder's weights."""
    return WEIGHTS_NAME


def read(folder: Path, stated: Mapping[str, Any] | None = None) -> SaeParts:
    """Read an SAE, checked against its configuration.

    `stated` is what SAELens's registry says about a release: `normalize_activations`, which replaces the file's, and
    `norm_scaling_factor`, which is folded if the file needs a factor but does not contain it.

    Raises:
        SaeError: it is damaged, or computes something that this version cannot.
    """
    where = f"SAE at '{folder}'"
    saved = _with_new_names(read_json(folder / CONFIG_NAME, where), where)
    stated = stated or {}
    saved |= {key: stated[key] for key in ("normalize_activations",) if key in stated}
    metadata = mapping(saved, "metadata", where)
    own = mapping(metadata, "thresher", where)
    metadata.pop("thresher", None)
    old = _is_old(saved, metadata, where)
    architecture = _architecture(saved, old, where)
    kind = find_kind(architecture)
    known = (*READ, *METADATA, *TRAINING, *kind.keys)
    # A BatchTopK SAE is saved as JumpReLU; an autoencoder may say that it is as wide at its end.
    known += ("k",) if kind.selection == "jumprelu" else ()
    known += ("d_out",) if saved.get("d_out") == saved.get("d_in") else ()
    check_known(saved, known, where)
    metadata = _joined_metadata(saved, metadata, where)
    scaling = _scaling(folder, saved, stated, kind, where)
    config = _config(saved, architecture, metadata, old, where)
    tensors = _rescaled(saved, config, read_safetensors(folder / WEIGHTS_NAME, where), where)
    d_in, d_sae = integer(saved, "d_in", where), integer(saved, "d_sae", where)
    d_out = d_in if kind.wiring == "sae" else integer(saved, "d_out", where, d_in)
    check_tensors(architecture, tensors, (d_in, d_sae, d_out), where, CONFIG_NAME)
    if kind.chooses_k:
        check_top_k(config["k"], d_sae, where)
    if kind.is_tied and not config["apply_b_dec_to_input"]:
        # SAELens then does not add it either.
        tensors |= {"b_dec": torch.zeros_like(tensors["b_dec"])}
        config["apply_b_dec_to_input"] = True
    for key in ("sae_lens_version", "sae_lens_training_version"):
        metadata.pop(key, None)
    folded: tuple[str, ...] = ()
    if isinstance(scaling, float):
        tensors |= {"W_enc": tensors["W_enc"] * scaling} | {n: tensors[n] / scaling for n in ("W_dec", "b_dec")}
        said = "which SAELens's registry states" if "norm_scaling_factor" in stated else f"of {_SCALER}"
        folded = (f"the factor {scaling:.4g} of what is read, {said}",)
    elif isinstance(scaling, dict):
        if config.get("rescale_acts_by_decoder_norm"):
            raise SaeError(f"{where} chooses by decoder norms, which whitening changes: fold it with SAELens first")
        tensors = fold_whitening(tensors, scaling, config["apply_b_dec_to_input"], where)
        folded = (f"the whitening of what is read, of {_WHITENING}",)
    return SaeParts(
        architecture,
        tensors,
        _hook_point(text(own, "hook_point", where), metadata.pop("hook_name", None) or "", where),
        _noted(mapping(own, "config", where), config) | config,
        metadata,
        folded,
    )


def _noted(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata notes, apart from what only the top level may say."""
    return {key: value for key, value in own.items() if key in config or key not in _DECIDED_ABOVE}


def _scaling(
    folder: Path, saved: dict[str, Any], stated: Mapping[str, Any], kind: Kind, where: str
) -> float | dict[str, Tensor] | None:
    """Return the factor by which rows are scaled, or how they are whitened, and set the configuration to `none`.

    A registry says the factor, or a file beside a checkpoint of training. None if nothing does, or need not.
    """
    normalization, found = saved.get("normalize_activations"), None
    if kind.is_tied or kind.wiring == "crosscoder":
        return None
    if normalization in (True, "expected_average_only_in"):
        found = stated.get("norm_scaling_factor")
        if found is None and (folder / _SCALER).is_file():
            found = read_json(folder / _SCALER, where).get("scaling_factor")
        if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or not found > 0):
            raise SaeError(f"{where} has scaling_factor {found!r}, expected a number above 0")
        found = None if found is None else float(found)
    elif normalization == "covariance_whitening" and (folder / _WHITENING).is_file():
        found = read_safetensors(folder / _WHITENING, where)
    if found is not None:
        saved["normalize_activations"] = "none"
    return found


def _with_new_names(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in saved.items():
        name = RENAMED.get(key, key)
        if name in renamed and renamed[name] != value:
            raise SaeError(f"{where} has two values of {name}, {renamed[name]!r} and {value!r}; expected one")
        renamed[name] = value
    return renamed


def _is_old(saved: Mapping[str, Any], metadata: Mapping[str, Any], where: str) -> bool:
    """Return whether the file is from before SAELens 6, or says nothing about that."""
    version = text(saved, "sae_lens_version", where) or text(metadata, "sae_lens_version", where)
    if not version:
        return True
    major = re.match(r"\d+", version)
    if major is None:
        raise SaeError(f"{where} has sae_lens_version '{version}', expected one such as '6.0.0'")
    return int(major[0]) < 6


def _architecture(saved: dict[str, Any], old: bool, where: str) -> str:
    """Return the architecture, and set k where old files have it in `activation_fn_kwargs`."""
    architecture = saved.get("architecture", "standard" if old else None)
    activation = text(saved, "activation_fn", where) or ("topk" if str(architecture).startswith("topk") else "relu")
    options = mapping(saved, "activation_fn_kwargs", where)
    if activation == "topk" and architecture == "standard" and old:
        architecture = "topk"
    if why := _OF_OTHER_FUNCTION.get(str(architecture)):
        raise SaeError(f"{where} has architecture '{architecture}', {why}, which is not supported")
    kind = find_kind(str(architecture), where)
    if activation != "relu" and activation != kind.selection:
        raise SaeError(
            f"{where} has architecture '{architecture}' with activation_fn '{activation}', which is not supported; "
            "expected 'relu', or 'topk' for a TopK SAE"
        )
    known = ("k", "use_sparse_activations") if kind.chooses_k else ()
    unknown = [key for key in options if key not in known]
    if unknown:
        raise SaeError(
            f"{where} has activation_fn_kwargs with {unknown[0]}, which an SAE of architecture "
            f"'{architecture}' does not use"
        )
    if "k" in options:
        if "k" in saved and saved["k"] != options["k"]:
            raise SaeError(f"{where} has k {saved['k']!r} and, in activation_fn_kwargs, {options['k']!r}; expected one")
        saved["k"] = options["k"]
    return str(architecture)


def _joined_metadata(saved: Mapping[str, Any], metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what either place says about where the SAE belongs; refuse what only some heads see."""
    joined = {key: saved[key] for key in METADATA if saved.get(key) is not None} | dict(metadata)
    for key in ("hook_name", "hook_name_out"):
        above, inside = text(saved, key, where), text(metadata, key, where)
        if above and inside and canonical_hook_point(above) != canonical_hook_point(inside):
            raise SaeError(f"{where} has {key} '{above}' and, in its metadata, '{inside}'; expected one")
        joined[key] = inside or above
        if joined[key] is None:
            del joined[key]
    for key in ("hook_head_index", "hook_head_index_out"):
        if joined.get(key) is not None:
            raise SaeError(f"{where} has {key} = {joined[key]!r}: it is of a single head, which is not supported")
    return joined


def _hook_point(trained_on: str | None, hook_name: str, where: str) -> str:
    """Return our name of the hook point, which `hook_name` may have been changed since to contradict."""
    if not trained_on:
        return canonical_hook_point(hook_name)
    # Before the two were separate, `mlp_in` was exported by the name of what TransformerLens reads before the gain.
    named = re.sub(r"\.ln2\.hook_normalized$", ".mlp_in", hook_name) if trained_on.endswith(".mlp_in") else hook_name
    if named and canonical_hook_point(named) != canonical_hook_point(trained_on):
        raise SaeError(
            f"{where} has hook_name '{hook_name}', but thresher.hook_point '{trained_on}' in its metadata; expected "
            "the same place: change both"
        )
    return trained_on


def _config(
    saved: Mapping[str, Any], architecture: str, metadata: Mapping[str, Any], old: bool, where: str
) -> dict[str, Any]:
    """Return the checked hyperparameters."""
    config = {key: saved[key] for key in TRAINING if key in saved}
    kind = find_kind(architecture)
    transcodes = kind.wiring == "transcoder"
    config["apply_b_dec_to_input"] = flag(saved, "apply_b_dec_to_input", where, not transcodes)
    if transcodes and config["apply_b_dec_to_input"]:
        raise SaeError(f"{where} is a transcoder with apply_b_dec_to_input = true, expected false")
    if kind.chooses_k:
        config["k"] = integer(saved, "k", where)
        config["rescale_acts_by_decoder_norm"] = flag(saved, "rescale_acts_by_decoder_norm", where, False)
    elif isinstance(saved.get("k"), int):
        config["k"] = saved["k"]
    if kind.is_tied:
        config |= _pursuit(saved, where)
    if kind.selection == "lista":
        rate = saved.get("refine_rate")
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not rate > 0:
            raise SaeError(f"{where} has refine_rate {rate!r}, expected a number above 0")
        config["refine_rate"] = float(rate)
    if kind.wiring == "crosscoder":
        config |= _places_of_crosscoder(saved, where)
    dtype = text(saved, "dtype", where)
    if dtype is not None and dtype.removeprefix("torch.") not in _DTYPES:
        raise SaeError(f"{where} has dtype '{dtype}', expected one of: {', '.join(_DTYPES)}")
    normalization = _normalization(saved.get("normalize_activations"), kind.wiring, where)
    config |= {"normalize_activations": normalization} if normalization != "none" else {}
    if _reshapes(saved, metadata.get("hook_name"), old, where):
        config["reshape_activations"] = "hook_z"
    return config


def _pursuit(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return when matching pursuit finishes a row."""
    threshold, limit, duplicates = PURSUIT
    found = saved.get(threshold, PURSUIT[threshold])
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise SaeError(f"{where} has {threshold} {found!r}, expected a number")
    steps = None if saved.get(limit) is None else integer(saved, limit, where)
    return {threshold: float(found), limit: steps, duplicates: flag(saved, duplicates, where, PURSUIT[duplicates])}


def _places_of_crosscoder(saved: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """Return `hook_points`, which are read and written, or `reads` and `writes`."""
    if "reads" not in saved and "writes" not in saved:
        return {"hook_points": _hook_points(saved, "hook_points", integer(saved, "d_in", where), 2, where)}
    d_in = integer(saved, "d_in", where)
    reads = _hook_points(saved, "reads", d_in, 1, where)
    return {"reads": reads, "writes": _hook_points(saved, "writes", integer(saved, "d_out", where, d_in), 1, where)}


def _hook_points(saved: Mapping[str, Any], key: str, width: int, least: int, where: str) -> list[str]:
    names = saved.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < least:
        raise SaeError(f"{where} has {key} {names!r}, expected the names of at least {('one', 'two')[least - 1]}")
    names = [canonical_hook_point(name) for name in names]
    if len(set(names)) < len(names):
        raise SaeError(f"{where} has {key} {names!r}, expected each once")
    if width % len(names):
        end = "d_in" if key != "writes" else "d_out"
        raise SaeError(f"{where} has {end} {width}, expected a multiple of its {len(names)} hook points")
    return names


def _normalization(kind: object, wiring: str, where: str) -> str:
    """Return how each row is normalised by its own statistics: true is the old name of expected_average_only_in.

    Raises:
        SaeError: rows are normalised by what the file does not say.
    """
    if kind is None or kind is False or kind == "none":
        return "none"
    if kind in ROW_NORMALIZATIONS and wiring != "crosscoder":
        return str(kind)
    kind = "expected_average_only_in" if kind is True else kind
    advice = (
        "fold it into the weights first, with fold_activation_norm_scaling_factor, because the file does not say the "
        "factor; if the weights take activations as they are, set it to 'none'"
        if kind == "expected_average_only_in"
        else "fold it with SAELens's fold_activation_whitening, as training does at its end, because the file lacks it"
        if kind == "covariance_whitening"
        else "no other is known of this kind of SAE"
    )
    known = ("none", *ROW_NORMALIZATIONS) if wiring != "crosscoder" else ("none",)
    raise SaeError(f"{where} has normalize_activations '{kind}', expected one of: {', '.join(known)}; {advice}")


def _reshapes(saved: Mapping[str, Any], hook_name: str | None, old: bool, where: str) -> bool:
    """Return whether SAELens flattens the heads of what it hooks, which are side by side in our rows already."""
    implied = "hook_z" if old and "hook_z" in (hook_name or "") else "none"
    kind = saved.get("reshape_activations", implied)
    if kind not in ("none", "hook_z"):
        raise SaeError(f"{where} has reshape_activations {kind!r}, expected 'none' or 'hook_z'")
    if kind == "hook_z" and hook_name is not None and not hook_name.endswith("_z"):
        raise SaeError(f"{where} has reshape_activations 'hook_z' at hook '{hook_name}', expected one that ends in _z")
    return kind == "hook_z"


def _rescaled(
    saved: Mapping[str, Any], config: Mapping[str, Any], tensors: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Fold `scaling_factor`, by which fine-tuning multiplied the latents before the decoder, into the decoder."""
    if "scaling_factor" not in tensors:
        return tensors
    factor, W_dec = tensors["scaling_factor"], tensors.get("W_dec")
    tensors = {name: tensor for name, tensor in tensors.items() if name != "scaling_factor"}
    if torch.allclose(factor.float(), torch.ones(factor.shape)):
        return tensors
    used = saved.get("finetuning_scaling_factor")
    if used is not True or config.get("rescale_acts_by_decoder_norm"):
        raise SaeError(
            f"{where} has the tensor scaling_factor with finetuning_scaling_factor {used!r}, expected true; it is not "
            "known whether latents are multiplied by it"
        )
    if W_dec is None or W_dec.ndim != 2 or factor.shape != W_dec.shape[:1]:
        raise SaeError(f"{where} is damaged: scaling_factor has shape {tuple(factor.shape)}, expected one per latent")
    return tensors | {"W_dec": W_dec.float() * factor.float()[:, None]}


def write(parts: SaeParts, folder: Path) -> None:
    """Write an SAE as SAELens v6 reads it."""
    kind, (d_sae, d_out) = find_kind(parts.architecture), parts.tensors["W_dec"].shape
    d_in = d_out if kind.is_tied else len(parts.tensors["W_enc"])
    config = dict(parts.config)
    if kind.wiring == "transcoder" or d_out != d_in:
        config["d_out"] = d_out
    described = saelens_config(parts.architecture, d_in, d_sae, parts.hook_point, config, parts.metadata)
    write_folder(folder, described, {name: parts.tensors[name] for name in kind.tensor_names})


FORMAT = SaeFormat(
    "saelens",
    f"{CONFIG_NAME} and {WEIGHTS_NAME}",
    folders(recognises),
    read,
    write,
    CONFIG_NAME,
    weights_name,
)
