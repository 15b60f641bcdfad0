"""The sparse ops that every architecture trains with, and which device runs which of them.

| backend | module | device |
|---|---|---|
| reference | `reference.py` | any: plain PyTorch, the oracle of the tests |
| cpu | `cpu/` | CPU: bf16 or int8 GEMM in row blocks, selection by groups, `embedding_bag` |
| triton | `triton/` | CUDA: hand-written kernels, see docs/kernels.md |
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from ...shared.core.errors import ConfigError

BACKENDS = ("auto", "reference", "cpu", "triton")


def kernels_for(device: torch.device | str, backend: str = "auto") -> ModuleType:
    """Return a device's module of `select_topk`, `decode`, `grad_values`, `grad_weights` and `sum_by_latent`.

    Raises `ConfigError` for a backend that does not exist or does not run there.
    """
    return import_module(f".{backend_for(device, backend)}", __name__)


def backend_for(device: torch.device | str, backend: str = "auto") -> str:
    """Return which backend a device runs: the one asked for, or for "auto" its own.

    Raises `ConfigError` as `kernels_for` does.
    """
    kind = torch.device(device).type
    if backend not in BACKENDS:
        raise ConfigError(f"kernels: expected one of {', '.join(BACKENDS)}, got '{backend}'")
    if backend == "auto":
        backend = {"cpu": "cpu", "cuda": "triton"}.get(kind, "reference")
    if backend in ("cpu", "triton") and kind != {"cpu": "cpu", "triton": "cuda"}[backend]:
        raise ConfigError(f"kernels: backend '{backend}' does not run on device '{kind}'; use 'auto' or 'reference'")
    return backend
