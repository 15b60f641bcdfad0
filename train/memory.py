"""The memory that an SAE needs in training, computed from shapes; free memory; and keeping memory that is freed."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .architectures.base import Architecture
from .architectures.contract import Parameters

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_KEPT = 256 << 20, 1 << 30
_OF_MALLOC = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"}
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "rdiv"}


class _WithoutValues(TorchFunctionMode):
    """Compute shapes of operations on meta tensors without PyTorch's compiler, whose import takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.rand):
            func = torch.empty
            kwargs.pop("generator", None)
        if func is Tensor.norm:
            first = args[0].narrow(kwargs["dim"], 0, 1)
            return first if kwargs.get("keepdim") else first.squeeze(kwargs["dim"])
        if func.__name__.strip("_") in _ARITHMETIC:
            return torch.broadcast_tensors(*(arg for arg in args if isinstance(arg, Tensor)))[0]
        return func(*args, **kwargs)


def parameter_shapes(architecture: Architecture) -> Parameters:
    """Return the initial parameters without values or memory."""
    with torch.device("meta"), _WithoutValues():
        return architecture.initial_parameters(torch.Generator("cpu"))


def held_bytes(architecture: Architecture, compute_dtype: str) -> int:
    """Return the bytes that an SAE holds between steps.

    These are its parameters, Adam's two moments, the running means of the parameters if it keeps them, copies of both
    matrices in the compute dtype (a CPU does not copy a float32 decoder), buffers, and the latents' counters.
    """
    parameters = parameter_shapes(architecture)
    with torch.device("meta"):
        buffers = architecture.initial_buffers()
    each = 4 if architecture.config.ema_decay else 3
    copies = parameters["W_enc"].numel() + parameters["W_dec"].numel()
    return (
        each * sum(tensor.nbytes for tensor in parameters.values())
        + copies * getattr(torch, compute_dtype).itemsize
        + sum(tensor.nbytes for tensor in buffers.values())
        + architecture.d_sae * torch.int64.itemsize
    )


def available_memory(device: str = "cpu") -> int:
    """Return the bytes of a device's memory that are free or can be freed."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Let this process keep memory that a step frees for the next step, if its C library is glibc.

    glibc would otherwise return it to the system from time to time, which clears every page before it is used again: 4%
    of a step of large SAEs. Environment variables that configure this take precedence.
    """
    if _OF_MALLOC & set(os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    if mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT):  # older versions reject it, and then the next does harm
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
