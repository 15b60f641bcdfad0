"""Tensors that claim to be on a GPU, on a machine that has none: what a real one would refuse or wait for is an error.

They have shapes and no values. An operation of tensors on two devices fails, as it does on a GPU; so does whatever must
read a value or a shape that only the GPU knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda:0"
# Their result is, or has a size, that only the device knows.
WAITING = {"nonzero", "argwhere", "bincount", "masked_select", "unique", "_unique2", "histc"}
WAITING |= {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"}
DTYPES = ("float", "double", "half", "bfloat16", "int", "long", "short", "bool")


class WaitsForTheDevice(AssertionError):
    """What was called reads a value of a tensor on the GPU."""


class WithoutDevice(TorchFunctionMode):
    """Compute by other operations what PyTorch's Python code, such as that of `x[...]`, does on a device there is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("_fused_adam_", "_fused_adamw_"):  # which have no shapes of their own to compute
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            assert {str(tensor.device) for tensor in tensors} == {DEVICE}, "fused Adam was given a tensor of the CPU"
            return None
        if not args or not isinstance(args[0], Tensor) or args[0].device.type != "cuda":
            return func(*args, **kwargs)
        if name in WAITING:
            raise WaitsForTheDevice(name)
        if name == "__getitem__":
            return self.read(*args)
        if name == "__setitem__":
            return self.write(*args)
        if name == "copy_":
            return torch.ops.aten.copy_.default(*args)
        if name == "__invert__":
            return torch.bitwise_not(args[0])
        if name == "contiguous":
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if name in DTYPES and func is getattr(Tensor, name):
            return args[0].to(getattr(torch, name))
        return func(*args, **kwargs)

    def read(self, tensor: Tensor, index: Any) -> Tensor:
        view, positions = basic(tensor, index)
        if not positions:
            return view
        for position in positions:
            if position is not None and position.dtype == torch.bool:
                raise WaitsForTheDevice("a mask on the device indexes")
        return torch.ops.aten.index.Tensor(view, positions)

    def write(self, tensor: Tensor, index: Any, value: Any) -> None:
        view, positions = basic(tensor, index)
        masks = [position for position in positions if position is not None and position.dtype == torch.bool]
        if masks and isinstance(value, Tensor) and value.dim():
            raise WaitsForTheDevice("a mask on the device is written to")
        if masks:
            view.masked_fill_(masks[0], value)
        elif positions:
            value = value if isinstance(value, Tensor) else torch.full((), value, dtype=view.dtype, device=view.device)
            torch.ops.aten.index_put_(view, positions, value)
        elif isinstance(value, Tensor):
            torch.ops.aten.copy_.default(view, value)
        else:
            view.fill_(value)


def basic(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Return what numbers, slices and None select, and the tensors that then index it."""
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = sum(
        part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else part is not None for part in parts
    )
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - taken + 1)
    view, dim = tensor, 0
    positions: dict[int, Tensor] = {}
    for part in parts:
        if part is None:
            view = view.unsqueeze(dim)
            dim += 1
        elif isinstance(part, Tensor) and (part.dim() or part.dtype == torch.bool):
            positions[dim] = part
            dim += part.dim() if part.dtype == torch.bool else 1
        elif isinstance(part, slice):
            view = torch.ops.aten.slice.Tensor(view, dim, part.start, part.stop, part.step or 1)
            dim += 1
        elif isinstance(part, Tensor):
            raise WaitsForTheDevice("a number on the device indexes")
        else:
            view = view.select(dim, int(part))
    return view, [positions.get(d) for d in range(max(positions, default=-1) + 1)]


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within this context tensors on `DEVICE` are fake, and those on the CPU become so when they meet an operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        card = SimpleNamespace(multi_processor_count=132)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
        patch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "Stream", lambda device=None: Mock(spec=["wait_stream"]))
        patch.setattr(torch.cuda, "Event", lambda: Mock(spec=["record", "synchronize"]))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, WithoutDevice():
            yield mode


def to_gpu(module: nn.Module) -> nn.Module:
    """Give a module parameters and buffers on `DEVICE`; what it holds beside them stays where it is."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = torch.empty_like(parameter, device=DEVICE)
            part._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty_like(buffer, device=DEVICE)
    return module
