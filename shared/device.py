"""Choose the device that a stage runs on."""

from __future__ import annotations

import torch

from .errors import ConfigError


def choose_device(device: str) -> str:
    """Return the device that "auto" means here (CUDA where there is any); refuse one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"expected device auto, cpu, cuda or cuda:N; got '{device}'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}' asked for, but this machine has no CUDA device; use device = 'cpu'")
    return device


def describe_device(device: str) -> str:
    """Return the device and, for a GPU, what it is."""
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
