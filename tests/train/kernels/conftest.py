"""Where the kernel tests run: Triton's interpreter on the CPU, or with `-m gpu` the GPU."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from thresher.shared.core.compute.cores import single_threaded_operators

# What on a GPU waits for the device, has a shape that only the device knows, or copies from the host's memory.
ASKING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "lift_fresh",
    "masked_scatter",
    "masked_select",
    "multinomial",
    "nonzero",
    "randperm",
    "unique_consecutive",
    "unique_dim",
}


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Return the device whose kernels are tested."""
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


@pytest.fixture(scope="session", autouse=True)
def _fit_interpreter():
    """Let Triton's interpreter run fast, and with NumPy 2.4 and later."""
    file = Path(__file__).parents[3] / "tools" / "gpu" / "interpreter.py"
    specification = importlib.util.spec_from_file_location("fit_interpreter", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    with module.fit_interpreter():
        yield


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Fill what `torch.empty` returns with NaN or nonsense: an element that no kernel writes then shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x5EEDBAD % 120)

    monkeypatch.setattr(torch, "empty", poisoned)


class Tape(TorchDispatchMode):
    """What a CUDA graph is of a step: its launches with the tensors and numbers that they had, and none of its Python.

    Recording changes no memory that was there before, as a capture does not. An operation that a capture would not
    allow, or one that asks the device for something, is refused.
    """

    def __init__(self):
        super().__init__()
        self.launches, self._before, self._made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in ASKING or by_mask or unsized:
            raise AssertionError(f"the step asks the device: {name}")
        if name in ("_fused_adam_", "_fused_adamw_"):
            assert_fused_adam_takes(*args[:4], args[5], kwargs)
        self.keep(args, kwargs)
        found = function(*args, **kwargs)
        self._made.update(tensor.untyped_storage().data_ptr() for tensor in tensors_in(found))

        def again():
            for was, now in zip(tensors_in(found), tensors_in(function(*args, **kwargs)), strict=True):
                if was.data_ptr() != now.data_ptr():
                    was.copy_(now)

        self.launches.append(again)
        return found

    def keep(self, *arguments):
        """Note what memory held before the first launch that was given it."""
        for tensor in tensors_in(arguments):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before and storage.data_ptr() not in self._made:
                self._before[storage.data_ptr()] = storage, storage.clone()

    def undo(self):
        for storage, held in self._before.values():
            storage.copy_(held)

    def replay(self):
        for launch in self.launches:
            launch()


def tensors_in(arguments):
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def assert_fused_adam_takes(parameters, gradients, means, squares, steps, kwargs):
    """Refuse what PyTorch's fused Adam refuses on CUDA, though not on a CPU."""
    for tensors in zip(parameters, gradients, means, squares, strict=True):
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        assert len({(t.dtype, t.shape, t.stride(), t.layout) for t in tensors}) == 1, "fused Adam: layouts differ"
        assert tensors[0].is_contiguous()
    for number in (*steps, kwargs["lr"], kwargs.get("found_inf")):
        assert number is None or (number.dtype == torch.float32 and number.dim() == 0), "fused Adam: not a float32"


@pytest.fixture
def taped(monkeypatch):
    """Return a list of the replays that there were, whose attribute `capture` stands for a capture on CUDA."""
    from triton.runtime.interpreter import GridExecutor

    recording, launch = [], GridExecutor.__call__

    def launch_or_record(self, *args, **kwargs):
        if not recording:
            return launch(self, *args, **kwargs)
        with _disable_current_modes():
            recording[0].keep(args, kwargs)
            launch(self, *args, **kwargs)
        recording[0].launches.append(lambda: launch(self, *args, **kwargs))
        return None

    monkeypatch.setattr(GridExecutor, "__call__", launch_or_record)

    class Replays(list):
        def capture(self, run):
            tape = Tape()
            recording.append(tape)
            # The batch is not there yet: what its memory holds is anything. The tape sees this thread's operators only.
            with single_threaded_operators(), tape, warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                run()
            recording.clear()
            tape.undo()

            def replay():
                self.append(None)
                tape.replay()

            return replay

    return Replays()
