"""Exact changes of an SAE's form, for formats that have one form only; what is not exact is a `NotExactError`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...core.errors import SaeError
from .kinds import Kind, find_kind
from .parts import SaeParts


class NotExactError(SaeError):
    """A format cannot hold an SAE without changing what it computes."""


def subtracts_b_dec(parts: SaeParts) -> bool:
    """Return whether `b_dec` is subtracted from the input."""
    return bool(parts.config.get("apply_b_dec_to_input", find_kind(parts.architecture).wiring != "transcoder"))


def subtracting_b_dec(parts: SaeParts, wanted: bool) -> SaeParts:
    """Return the same function with or without `b_dec` subtracted from the input, by a change of the encoder's biases.

    `(x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc)`. A transcoder's `b_dec` is of its output, so it is
    left as it is.
    """
    if find_kind(parts.architecture).wiring == "transcoder" or subtracts_b_dec(parts) == wanted:
        return parts
    shift = parts.tensors["b_dec"].float() @ parts.tensors["W_enc"].float()
    shift = shift if wanted else -shift
    tensors = dict(parts.tensors)
    if "b_enc" in tensors:
        tensors["b_enc"] = tensors["b_enc"].float() + shift
    else:
        tensors["b_gate"] = tensors["b_gate"].float() + shift
        tensors["b_mag"] = tensors["b_mag"].float() + shift * tensors["r_mag"].float().exp()
    return replace(parts, tensors=tensors, config=parts.config | {"apply_b_dec_to_input": wanted})


def fold_whitening(
    tensors: Mapping[str, Tensor], whitening: Mapping[str, Tensor], subtracts: bool, where: str
) -> dict[str, Tensor]:
    """Return an SAE of rows `(x - mean) matrix`, whose output is `y inverse_matrix + mean`, as one of rows `x`.

    With `b_dec` subtracted from the input, its new value takes the mean away too.

    Raises:
        SaeError: the whitening is not of such rows.
    """
    d = len(tensors["W_enc"])
    shapes = {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}
    if {name: tuple(tensor.shape) for name, tensor in whitening.items()} != shapes or tensors["W_dec"].shape[1] != d:
        raise SaeError(f"{where} is damaged: its whitening is not of rows of {d} channels that it reads and writes")
    mean, matrix, inverse = (whitening[name].double() for name in shapes)
    W_enc = matrix @ tensors["W_enc"].double()
    changed = {"W_enc": W_enc, "W_dec": tensors["W_dec"].double() @ inverse}
    changed["b_dec"] = tensors["b_dec"].double() @ inverse + mean
    shift = torch.zeros_like(W_enc[0]) if subtracts else mean @ W_enc
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in tensors:
            gain = tensors["r_mag"].double().exp() if name == "b_mag" else 1
            changed[name] = tensors[name].double() - shift * gain
    return dict(tensors) | {name: tensor.to(tensors[name].dtype) for name, tensor in changed.items()}


def split_signs(parts: SaeParts) -> SaeParts:
    """Return the same function with two latents for each that may be negative, and others as they are.

    The k largest of `|z|` are the k largest of `z` and `-z` side by side, after ReLU: latent i + d_sae is active where
    latent i is negative, with the opposite decoder row.
    """
    kind = find_kind(parts.architecture)
    if not kind.is_signed:
        return parts
    t = parts.tensors
    both = {"W_enc": torch.cat([t["W_enc"], -t["W_enc"]], dim=1)}
    both |= {name: torch.cat([t[name], -t[name]]) for name in ("b_enc", "W_dec")}
    return replace(parts, architecture=Kind("topk", kind.wiring, kind.skip).name, tensors=dict(t) | both)


def as_jumprelu(parts: SaeParts, format_name: str) -> SaeParts:
    """Return a ReLU or gated SAE as JumpReLU, which computes the same.

    A gate `x W + b_gate > 0` opens where the magnitude `x W exp(r) + b_mag` is above `b_mag - b_gate exp(r)`
    (arXiv 2404.16014, appendix H). A ReLU is a JumpReLU with thresholds of zero.

    Raises:
        NotExactError: the k largest latents are chosen.
    """
    kind = find_kind(parts.architecture)
    if kind.chooses_k:
        raise NotExactError(
            f"{format_name} has a threshold per latent, and this {parts.architecture} chooses the k largest of a row; "
            "with --approximate and --store, thresholds are chosen that fire equally often"
        )
    if kind.selection == "jumprelu":
        return parts
    if kind.selection not in ("standard", "gated"):
        raise NotExactError(f"{format_name} has a threshold per latent, and this {parts.architecture} chooses twice")
    tensors = dict(parts.tensors)
    if kind.selection == "standard":
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
    else:
        b_gate, b_mag, gain = (tensors.pop(name).float() for name in ("b_gate", "b_mag", "r_mag"))
        gain = gain.exp()
        tensors |= {"W_enc": tensors["W_enc"].float() * gain, "b_enc": b_mag, "threshold": b_mag - b_gate * gain}
    name = Kind("jumprelu", kind.wiring, kind.skip).name
    return replace(parts, architecture=name, tensors=tensors)


def normalizes_rows(parts: SaeParts) -> str:
    """Return how an SAE normalises each row before it encodes it, or an empty text."""
    kind = str(parts.config.get("normalize_activations") or "none")
    return "" if kind == "none" else kind


def require(
    parts: SaeParts,
    format_name: str,
    selections: tuple[str, ...],
    wirings: tuple[str, ...],
    normalizations: tuple[str, ...] = (),
) -> Kind:
    """Return an SAE's kind, if a format has it; `normalizations` are those of rows that it can state.

    Raises:
        SaeError: it is wired in a way that the format does not have.
        NotExactError: its latents are chosen in a way that the format does not have.
    """
    if parts.architecture == "cross_layer_transcoder":
        raise SaeError(f"{format_name} has no cross-layer transcoders; expected one of: circuit-tracer, thresher")
    kind, normalization = find_kind(parts.architecture), normalizes_rows(parts)
    if kind.is_tied:
        raise SaeError(
            f"{format_name} cannot hold a {parts.architecture} SAE, which encodes in steps; expected saelens"
        )
    if normalization and normalization not in normalizations:
        raise SaeError(
            f"{format_name} cannot state that each row is normalised before it is encoded, as this SAE does "
            f"({normalization}); expected format saelens"
        )
    if kind.wiring not in wirings or (kind.skip and "skip" not in wirings):
        kinds = ", ".join(f"{wiring}s" for wiring in wirings if wiring != "skip")
        raise SaeError(f"{format_name} cannot hold a {parts.architecture}; expected one of: {kinds}")
    if kind.selection not in selections:
        raise NotExactError(
            f"{format_name} has {' or '.join(selections)} SAEs, and this one is {kind.selection}; "
            "--approximate with --store converts it and states what is lost"
        )
    return kind


def float32_copy(tensor: Tensor) -> Tensor:
    """Return a tensor as float32 in memory of its own, for a file."""
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()
