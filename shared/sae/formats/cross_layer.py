"""Thresher's cross-layer transcoders: `cfg.json` and `sae_weights.safetensors`, with circuit-tracer's tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import SaeError
from ...core.version import thresher_version
from .files import CONFIG_NAME, WEIGHTS_NAME, write_folder
from .format import SaeFormat, folders
from .parts import SaeParts, check_known, check_top_k, integer, mapping, text
from .reading import read_json, read_safetensors

ARCHITECTURE = "cross_layer_transcoder"
ACTIVATIONS = ("relu", "jumprelu", "topk")
SELECT_OVER = ("all", "layer")
_KEYS = (
    "architecture",
    "n_layers",
    "d_sae",
    "d_in",
    "d_out",
    "reads",
    "writes",
    "activation",
    "k",
    "select_over",
    "dtype",
    "metadata",
)


def cross_layer_config(
    sizes: tuple[int, int, int, int], config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of `cfg.json`; `sizes` are the layers, and each one's latents, input and output channels."""
    n_layers, d_sae, d_in, d_out = sizes
    topk = {"k": config["k"], "select_over": config.get("select_over", "all")} if config["activation"] == "topk" else {}
    return {
        "architecture": ARCHITECTURE,
        "n_layers": n_layers,
        "d_sae": d_sae,
        "d_in": d_in,
        "d_out": d_out,
        "reads": list(config["reads"]),
        "writes": list(config["writes"]),
        "activation": config["activation"],
        **topk,
        "dtype": "float32",
        "metadata": {**metadata, "thresher": {"version": thresher_version(), "config": dict(config)}},
    }


def weights_name(folder: Path) -> str:
    """Return the name of a folder's weights."""
    return WEIGHTS_NAME


def recognises(folder: Path) -> bool:
    """Return whether a folder has a cross-layer transcoder of this format."""
    if not ((folder / WEIGHTS_NAME).is_file() and (folder / CONFIG_NAME).is_file()):
        return False
    try:
        return read_json(folder / CONFIG_NAME, "").get("architecture") == ARCHITECTURE
    except SaeError:
        return False


def read(folder: Path) -> SaeParts:
    """Read a transcoder, checked against its configuration.

    Raises:
        SaeError: it is damaged, or computes something that this version cannot.
    """
    where = f"cross-layer transcoder at '{folder}'"
    saved = read_json(folder / CONFIG_NAME, where)
    check_known(saved, _KEYS, where)
    metadata = mapping(saved, "metadata", where)
    own = mapping(metadata, "thresher", where)
    metadata.pop("thresher", None)
    sizes = tuple(integer(saved, key, where) for key in ("n_layers", "d_sae", "d_in", "d_out"))
    config: dict[str, Any] = {"activation": _one_of(saved, "activation", ACTIVATIONS, where)}
    for key in ("reads", "writes"):
        names = saved.get(key)
        if not isinstance(names, list) or len(names) != sizes[0] or not all(isinstance(name, str) for name in names):
            raise SaeError(f"{where} has {key} {names!r}, expected the names of {sizes[0]} hook points, one per layer")
        config[key] = names
    if config["activation"] == "topk":
        config["k"] = integer(saved, "k", where)
        config["select_over"] = _one_of(saved, "select_over", SELECT_OVER, where)
        check_top_k(config["k"], sizes[1] * (sizes[0] if config["select_over"] == "all" else 1), where)
    tensors = read_safetensors(folder / WEIGHTS_NAME, where)
    check_cross_layer(tensors, sizes, config["activation"], where)
    return SaeParts(ARCHITECTURE, tensors, "", mapping(own, "config", where) | config, metadata)


def write(parts: SaeParts, folder: Path) -> None:
    """Write a transcoder as `Sae.load` reads it."""
    d_sae, d_in = parts.tensors["W_enc_0"].shape
    sizes = (len(parts.config["reads"]), d_sae, d_in, len(parts.tensors["b_dec_0"]))
    write_folder(folder, cross_layer_config(sizes, parts.config, parts.metadata), parts.tensors)


def _one_of(saved: Mapping[str, Any], key: str, known: tuple[str, ...], where: str) -> str:
    value = text(saved, key, where)
    if value not in known:
        raise SaeError(f"{where} has {key} {value!r}, expected one of: {', '.join(known)}")
    return value


def check_cross_layer(tensors: Mapping[str, Tensor], sizes: tuple[int, ...], activation: str, where: str) -> None:
    """Raise `SaeError` unless the tensors are exactly a transcoder's, for `sizes` of layers, latents, input, output."""
    n_layers, d_sae, d_in, d_out = sizes
    shapes: dict[str, tuple[int, ...]] = {}
    skip = "W_skip_0" in tensors
    for i in range(n_layers):
        shapes |= {f"W_enc_{i}": (d_sae, d_in), f"b_enc_{i}": (d_sae,)}
        shapes |= {f"W_skip_{i}": (d_out, d_in)} if skip else {}
        shapes |= {f"W_dec_{i}": (d_sae, n_layers - i, d_out), f"b_dec_{i}": (d_out,)}
        if activation == "jumprelu":
            shapes[f"threshold_{i}"] = (d_sae,)
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has {unknown[0]}, which is not known"
        raise SaeError(f"{where} is damaged: its weights file {what}")
    for name, shape in shapes.items():
        if not tensors[name].is_floating_point() or tuple(tensors[name].shape) != shape:
            raise SaeError(
                f"{where} is damaged: {name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, expected "
                f"floating-point numbers of shape {shape} from {CONFIG_NAME}"
            )


FORMAT = SaeFormat(
    "thresher", f"{CONFIG_NAME} and {WEIGHTS_NAME}", folders(recognises), read, write, CONFIG_NAME, weights_name
)
