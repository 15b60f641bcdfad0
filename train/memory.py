"""The memory that an SAE needs in training, computed from shapes; free memory; and keeping memory that is freed."""

from __future__ import annotations

import ctypes
import math
import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .architectures.base import Architecture
from .architectures.contract import Parameters, is_per_latent
from .kernels.csc import MAX_SEGMENT
from .kernels.fused_state import GROUP

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


class Memory(NamedTuple):
    """Bytes that SAEs take in a process, by what they are."""

    weights: int = 0
    moments: int = 0
    averages: int = 0
    copies: int = 0
    counters: int = 0
    gradients: int = 0

    def plus(self, other: Memory, at_once: bool = True) -> Memory:
        """Return the sum of both; if their steps are not taken at once, gradients share memory."""
        total = Memory(*(one + two for one, two in zip(self, other, strict=True)))
        return total if at_once else total._replace(gradients=max(self.gradients, other.gradients))


Path = Literal["cpu", "ops", "fused"]
"""How an SAE steps: by operations alone on a CPU, by operations otherwise, or by TopK's fused step."""


def sae_memory(architecture: Architecture, compute_dtype: str, path: Path = "cpu", n_shards: int = 1) -> Memory:
    """Return the memory of an SAE, or of the largest of `n_shards` parts of its latents.

    It is exact except for gradients, counted as in a step that computes all of them before it uses one; a fused step
    has none. Copies are those in the compute dtype: of both matrices on a CPU (which does not copy a float32 decoder),
    of the encoder on other paths, and of every parameter in a fused step. Counters include the architecture's
    buffers.
    """
    parameters = parameter_shapes(architecture)
    with torch.device("meta"):
        buffers = architecture.initial_buffers()

    def elements(name: str) -> int:
        shape = parameters[name].shape
        rows = -(-shape[0] // n_shards) if is_per_latent(name) else shape[0]
        return rows * math.prod(shape[1:])

    weights = 4 * sum(map(elements, parameters))
    copied = {"fused": list(parameters), "ops": ["W_enc"], "cpu": ["W_enc", "W_dec"]}[path]
    if path == "cpu" and compute_dtype == "float32":
        copied.remove("W_dec")
    if "W_enc" not in parameters:
        copied = ["W_dec"]
    return Memory(
        weights=weights,
        moments=2 * weights,
        averages=weights if architecture.config.ema_decay else 0,
        copies=getattr(torch, compute_dtype).itemsize * sum(map(elements, copied)),
        counters=torch.int64.itemsize * -(-architecture.d_sae // n_shards) + sum(t.nbytes for t in buffers.values()),
        gradients=0 if path == "fused" else weights,
    )


def fused_step_bytes(batch_size: int, k: int, d_sae: int, d_in: int) -> int:
    """Return the bytes of the sums that a fused step keeps of a batch's entries: of hot latents, and for `b_dec`."""
    n_segments = batch_size * k // MAX_SEGMENT
    return torch.float32.itemsize * d_in * (2 * n_segments + -(-d_sae // GROUP))


def held_bytes(architecture: Architecture, compute_dtype: str) -> int:
    """Return the bytes that an SAE which a CPU trains alone holds between steps."""
    return sum(sae_memory(architecture, compute_dtype)._replace(gradients=0))


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
