"""The operations that all architectures train with, and the backends that provide them.

`backend.py` is the contract of a backend.

| backend | module | device |
|---|---|---|
| reference | `reference.py` | any: plain PyTorch, against which the others are tested |
| cpu | `cpu/` | CPU: bf16 or int8 GEMM in row blocks, selection by groups, `embedding_bag` |
| triton | `triton/` | CUDA: hand-written kernels, see docs/kernels.md |
"""

from __future__ import annotations

import torch

from ...shared.core.errors import ConfigError
from .backend import Backend

BACKENDS = ("auto", "reference", "cpu", "triton")


def kernels_for(device: torch.device | str, backend: str = "auto") -> Backend:
    """Return the backend of a device: the one named, or for "auto" the device's own.

    Raises:
        ConfigError: there is no such backend, or it does not run on the device.
    """
    name = backend_for(device, backend)
    if name == "cpu":
        from .cpu import Cpu

        return Cpu()
    if name == "triton":
        from .triton import Triton  # imported here so that other backends work without it

        return Triton()
    from .reference import Reference

    return Reference()


def backend_for(device: torch.device | str, backend: str = "auto") -> str:
    """Return the name of the backend that `kernels_for` returns.

    Raises:
        ConfigError: as `kernels_for` does.
    """
    kind = torch.device(device).type
    if backend not in BACKENDS:
        raise ConfigError(f"kernels: expected one of {', '.join(BACKENDS)}, got '{backend}'")
    if backend == "auto":
        backend = {"cpu": "cpu", "cuda": "triton"}.get(kind, "reference")
    if backend in ("cpu", "triton") and kind != {"cpu": "cpu", "triton": "cuda"}[backend]:
        raise ConfigError(f"kernels: backend '{backend}' does not run on device '{kind}'; use 'auto' or 'reference'")
    return backend
