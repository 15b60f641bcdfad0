"""What every reader of a format returns, and the checks that all of them make."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...core.errors import SaeError
from .kinds import find_kind


@dataclass(frozen=True)
class SaeParts:
    """An SAE as read from files: tensors in Thresher's layout, and what the files say about them.

    Tensors are of the files' floating-point type. `folded` says in words what reading changed so that the SAE takes and
    returns activations as they are, and `format` which format it was.
    """

    architecture: str
    tensors: dict[str, Tensor]
    hook_point: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    format: str = ""


def check_known(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise `SaeError` for a key that is not in `known`, unless its value says that nothing is there.

    A key that a newer library adds may change what the SAE computes, so it is refused rather than ignored.
    """
    for key, value in config.items():
        if key not in known and not _is_absent(value):
            raise SaeError(
                f"{where} has {key} = {value!r}, which this version does not know and which may change what the SAE "
                "computes; remove the key if it does not"
            )


def _is_absent(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and value in ("", "none", [], {}))


def integer(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """Return a whole number of at least one, or raise `SaeError`."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SaeError(f"{where} has {key} {value!r}, expected a whole number of at least 1")
    return value


def flag(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """Return a boolean, or raise `SaeError`."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise SaeError(f"{where} has {key} {value!r}, expected true or false")
    return value


def text(config: Mapping[str, Any], key: str, where: str) -> str | None:
    """Return a string or None, or raise `SaeError`."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise SaeError(f"{where} has {key} {value!r}, expected text")
    return value


def mapping(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return an object, empty where the key is absent or null, or raise `SaeError`."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise SaeError(f"{where} has {key} {value!r}, expected an object")
    return dict(value or {})


def check_top_k(k: int, d_sae: int, where: str) -> None:
    """Raise `SaeError` if there are fewer latents than are kept."""
    if k > d_sae:
        raise SaeError(f"{where} is damaged: k is {k}, expected 1 to d_sae = {d_sae}")


def encoder_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return d_in and d_sae of an encoder `[d_in, d_sae]`; zeros, which `check_tensors` refuses, if it is no matrix."""
    shape = tensors["W_enc"].shape
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)


def check_tensors(
    architecture: str, tensors: Mapping[str, Tensor], sizes: tuple[int, int, int], where: str, described_by: str
) -> None:
    """Raise `SaeError` unless the tensors are exactly an architecture's, for `sizes` of d_in, d_sae and d_out."""
    d_in, d_sae, d_out = sizes
    expected = find_kind(architecture).tensor_names
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise SaeError(f"{where} is damaged: its weights file lacks {', '.join(missing)}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise SaeError(
            f"{where} has the tensor {unknown[0]}, which an SAE of architecture '{architecture}' does not use; "
            f"expected only {', '.join(expected)}"
        )
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    for name in expected:
        if not tensors[name].is_floating_point():
            raise SaeError(f"{where} is damaged: {name} holds {tensors[name].dtype}, expected floating-point numbers")
        shape = shapes.get(name, (d_sae,))
        if tuple(tensors[name].shape) != shape:
            raise SaeError(
                f"{where} is damaged: {name} has shape {tuple(tensors[name].shape)}, expected {shape} "
                f"from {described_by}"
            )


def take(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], others: Collection[str], where: str
) -> dict[str, Tensor]:
    """Return our tensors from a library's names; a name that ends in `.T` is transposed, without a copy.

    `others` may be there as well; any other tensor is refused.
    """
    theirs = {ours: name.removesuffix(".T") for ours, name in names.items()}
    missing = [name for name in theirs.values() if name not in tensors]
    if missing:
        raise SaeError(f"{where} is damaged: its weights lack {', '.join(missing)}")
    unknown = sorted(set(tensors) - set(theirs.values()) - set(others))
    if unknown:
        raise SaeError(
            f"{where} has the tensor {unknown[0]}, which this version does not know; expected only "
            f"{', '.join(theirs.values())}"
        )
    taken = {}
    for ours, name in theirs.items():
        transposed = names[ours].endswith(".T") and tensors[name].ndim == 2
        taken[ours] = tensors[name].T if transposed else tensors[name]
    return taken
