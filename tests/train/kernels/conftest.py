"""Where the kernel tests run: Triton's interpreter on the CPU, or with `-m gpu` the GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Return the device whose kernels are tested."""
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


@pytest.fixture(scope="session", autouse=True)
def _patch_language_once_a_launch():
    """Spare Triton's interpreter its dearest work.

    At every call of a device function it wraps all of `triton.language` anew, 2 ms for each `tl.sum`;
    once a launch and module is enough.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return patch(function)
        return None

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
    yield
    monkeypatch.undo()


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Fill what `torch.empty` returns with NaN or nonsense: an element that no kernel writes then shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x5EEDBAD % 120)

    monkeypatch.setattr(torch, "empty", poisoned)
