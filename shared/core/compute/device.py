"""Choose the device that a stage runs on."""

from __future__ import annotations

import re

import torch

from ..errors import ConfigError


def choose_device(device: str) -> str:
    """Return the device to use: "auto" means CUDA if available. Raise `ConfigError` if it does not exist."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"expected device auto, cpu, cuda or cuda:N; got '{device}'")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device is '{device}', but this machine has no CUDA device; use device = 'cpu'")
    return device


def device_among(device: str, local_rank: int, local_n: int) -> str:
    """Return the device of one of a machine's processes: "cuda" means GPU number `local_rank`.

    Raises:
        ConfigError: there is no such device, or not one for each process.
    """
    chosen = torch.device(choose_device(device))
    if chosen.type != "cuda":
        return str(chosen)
    if chosen.index is not None:
        if local_n > 1:
            raise ConfigError(
                f"device is '{device}', but each of {local_n} processes needs its own; use device = 'cuda'"
            )
        return str(chosen)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{local_n} processes were started on a machine with {torch.cuda.device_count()} CUDA devices; "
            "start at most one for each device"
        )
    return f"cuda:{local_rank}"


def make_current(device: str) -> None:
    """Make a numbered GPU the current one, where libraries launch kernels; "cuda" already means the current one."""
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)


def numbered(device: str | torch.device) -> torch.device:
    """Return a device that is the same in every thread: "cuda" becomes the calling thread's current GPU, numbered."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def describe_device(device: str) -> str:
    """Return the device's name and, for a GPU, its model."""
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
