"""Where a model's weights are: on one device, spread over devices and the disk, or divided among processes.

accelerate spreads a model (`device_map`): each module runs on its own device, and weights in the host's memory or on
the disk are loaded just before their module runs. transformers divides one among processes (tensor parallelism).
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.compute.launcher import n_launched
from ...core.errors import ConfigError, ModelError

_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMG]i?B")


class Spread(NamedTuple):
    """How accelerate spreads a model over the devices of one process, and how much each may hold."""

    device_map: str
    max_memory: Mapping[str, str] | None = None
    offload_folder: str | None = None


@contextmanager
def spreading(spread: Spread | None) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Yield the arguments with which `from_pretrained` spreads a model, and the temporary folder among them, if any.

    The folder is removed if the model is not loaded; `remove_with` removes it with the model.
    """
    if spread is None:
        yield {}, None
        return
    memory = {int(name) if name.isdigit() else name: size for name, size in (spread.max_memory or {}).items()}
    temporary = None if spread.offload_folder else tempfile.mkdtemp(prefix="thresher-offload-")
    options: dict[str, Any] = {"device_map": spread.device_map, "offload_folder": spread.offload_folder or temporary}
    try:
        yield options | ({"max_memory": memory} if memory else {}), temporary
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def spread_of(
    device_map: str | None, max_memory: Mapping[str, str] | None, offload_folder: str | None, device: str
) -> Spread | None:
    """Return how to spread a model, from a configuration's settings, or None to put it on one device.

    Raises:
        ConfigError: the settings contradict each other.
        ModelError: accelerate is not installed.
    """
    if device_map is None:
        for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise ConfigError(f"{name} is for a model that is spread; set device_map = 'auto', or leave it out")
        return None
    if n_launched() > 1:
        raise ConfigError(
            f"device_map = '{device_map}' spreads the model over all devices of one process, but {n_launched()} "
            "processes were started; start one, or divide the model among them (tensor_parallel)"
        )
    if device != "auto":
        raise ConfigError(
            f"device is '{device}', but device_map = '{device_map}' chooses the devices; leave one of them out "
            "(max_memory limits what each device holds)"
        )
    for name, size in (max_memory or {}).items():
        if not (name in ("cpu", "disk") or name.isdigit()) or not _SIZE.fullmatch(size):
            raise ConfigError(
                f"max_memory has {name} = '{size}'; expected the number of a GPU, or cpu, and a size such as '20GiB'"
            )
    if find_spec("accelerate") is None:
        raise ModelError("device_map needs accelerate, which is not installed: pip install 'thresher[spread]'")
    return Spread(device_map, max_memory, offload_folder)


def remove_with(model: nn.Module, folder: str | None) -> None:
    """Remove a temporary folder when the model is no longer used."""
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def is_spread(model: nn.Module) -> bool:
    """Return whether accelerate moves the model's activations or weights."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) > 1 or "disk" in places


def is_divided(model: nn.Module) -> bool:
    """Return whether each process holds only a part of the weights."""
    return (getattr(model, "tp_size", None) or 1) > 1


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model reads its tokens on, and that its activations are brought to."""
    if not is_spread(model):
        return next(model.parameters()).device
    places: dict[str, int | str | torch.device] = model.hf_device_map  # pyright: ignore[reportAssignmentType]
    devices = [place for place in places.values() if place not in ("cpu", "disk")]
    if not devices:
        return torch.device("cpu")
    return torch.device("cuda", devices[0]) if isinstance(devices[0], int) else torch.device(devices[0])


def loaded(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's parameter, read from where it is kept if it is loaded only while the module runs."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value if isinstance(value, Tensor) else None
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return kept[name].to(device=one.execution_device, dtype=value.dtype)
    raise ModelError(f"the weight {name} of {type(module).__name__} has no values")
