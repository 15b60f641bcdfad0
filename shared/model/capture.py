"""Read activations in a forward pass that stops after the last hook point, or replace an activation."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.errors import HookPointError
from .certificate import measure
from .hook_points import KINDS, ResolvedHookPoint, block_and_kind, unique_canonical
from .loading.placement import input_device
from .probe.arguments import activation_of, input_argument, with_input, with_output
from .probe.blocks import Blocks
from .probe.finding import Finding

MODULE_PATHS_NOTE = "any module's path names that module's own output"
"""Note on the names that are valid beside the canonical ones."""


class _AllRead(BaseException):
    """Ends a forward pass once every hook point has been read. A `BaseException`, so that no model code catches it."""


def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "batch context"],
    hook_points: Mapping[str, ResolvedHookPoint],
    truncate: bool = True,
) -> dict[str, Float[Tensor, "batch context d_in"]]:
    """Return the activation at every hook point, from one forward pass without gradients.

    With `truncate`, the pass ends at the last hook point, so that later layers, the final norm and the unembedding cost
    nothing.
    """
    with capturing(model, hook_points, truncate) as read:
        return read(input_ids)


@contextmanager
def capturing(
    model: nn.Module, hook_points: Mapping[str, ResolvedHookPoint], truncate: bool = True
) -> Iterator[Callable[[Int[Tensor, "batch context"]], dict[str, Float[Tensor, "batch context d_in"]]]]:
    """Register hooks on the model and yield a function that captures; several threads may call it at once.

    The hooks are shared; each thread gets its own activations.
    """
    captured = threading.local()

    def store_as(name: str) -> Callable[[Tensor], None]:
        def reader(activation: Tensor) -> None:
            activations: dict[str, Tensor] | None = getattr(captured, "activations", None)
            if activations is None:
                return
            activations[name] = activation.detach()
            if truncate and len(activations) == len(hook_points):
                raise _AllRead

        return reader

    def read(input_ids: Tensor) -> dict[str, Tensor]:
        activations: dict[str, Tensor] = {}
        captured.activations = activations
        try:
            with torch.inference_mode():
                _forward(model, input_ids)
        except _AllRead:
            pass
        finally:
            captured.activations = None
        missing = [name for name in hook_points if name not in activations]
        if missing:
            raise HookPointError(f"the forward pass of {type(model).__name__} never reached {', '.join(missing)}")
        return {name: activations[name] for name in hook_points}

    with ExitStack() as stack:
        for name, hook_point in hook_points.items():
            stack.enter_context(reading(model, hook_point, store_as(name)))
        yield read


def splice(
    model: nn.Module,
    hook_point: ResolvedHookPoint,
    replace: Callable[[Float[Tensor, "batch context d_in"]], Float[Tensor, "batch context d_in"]],
) -> AbstractContextManager[None]:
    """Within this context, replace the activation by `replace(activation)` in the model's forward passes.

    The activation is on the model's `input_device`, also if the module runs on another. Raises `HookPointError` if the
    measurement showed that the activation cannot be replaced.
    """
    check_splices(model, hook_point)
    scale, affine = hook_point.scale, hook_point.affine
    replace = _brought(replace, input_device(model))

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        argument = input_argument(args, kwargs)
        assert argument is not None
        activation = kwargs[argument] if isinstance(argument, str) else args[argument]
        new = replace(activation)
        if hook_point.splice == "replace":
            return with_input(args, kwargs, argument, new)
        if new is not activation:
            activation.copy_(new)
        return None

    def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = activation_of(output)
        if affine is None and scale == 1:
            return with_output(output, replace(given))
        activation = given * scale if affine is None else affine.normalize(_input(args, kwargs))
        new = replace(activation)
        if new is activation:
            return None
        back = new / scale if affine is None else affine.apply(module, new)
        if not new.requires_grad:  # rows that were left alone keep the bits that the module gave them
            back = torch.where((new == activation).all(dim=-1, keepdim=True), given, back)
        return with_output(output, back)

    return _hooked(model, hook_point, on_input, on_output)


def check_splices(model: nn.Module, hook_point: ResolvedHookPoint) -> None:
    """Raise `HookPointError` if the model's activation at a hook point cannot be replaced."""
    if not hook_point.splice:
        raise HookPointError(
            f"nothing can be spliced in at '{hook_point.name}' in {type(model).__name__}: replacing the activation of "
            f"{hook_point.module_path} changes less or more than what the name stands for; choose a hook point that "
            "`thresher hooks` does not mark as read-only"
        )


def resolve_hook_points(model: nn.Module, names: Iterable[str]) -> dict[str, ResolvedHookPoint]:
    """Find hook points in a model by canonical name, SAELens spelling or module path.

    Runs the model on a few tokens to check the identity of each canonical name and to measure each width. Raises
    `HookPointError`, with the names that the model has, for an unknown name, for a name whose identity does not hold,
    and for a module whose output is not one `[batch, context, d]` activation per pass.
    """
    wanted = unique_canonical(names)
    inside = {name: found for name in wanted if (found := block_and_kind(name)) is not None}
    blocks, findings = measure(model, {layer for layer, _ in inside.values()})
    paths = {name: _module_path(model, name, blocks, findings) for name in wanted if name not in inside}
    widths = _widths(model, paths)
    resolved = {}
    for name in wanted:
        if name in inside:
            resolved[name] = _resolved(model, name, *inside[name], blocks, findings)
        else:
            layer = _layer_of(blocks, paths[name])
            resolved[name] = ResolvedHookPoint(name, paths[name], "output", layer, widths[name])
    return resolved


def _resolved(
    model: nn.Module,
    name: str,
    layer: int,
    kind: str,
    blocks: Blocks | None,
    findings: Mapping[tuple[int, str], Finding],
) -> ResolvedHookPoint:
    """Return a block's hook point from the measured findings, or raise `HookPointError` with the reason."""
    found = findings.get((layer, kind))
    if found is None:
        raise HookPointError(_unknown(model, name, blocks, findings))
    if found.place is None:
        assert blocks is not None
        raise HookPointError(
            f"no hook point '{name}' in {type(model).__name__}: {found.reason}; `thresher hooks MODEL` lists those it "
            f"has, and {MODULE_PATHS_NOTE}, such as '{blocks.path}.{layer}'"
        )
    return ResolvedHookPoint(
        name,
        *found.place,
        layer,
        found.d_in,
        found.scale,
        found.affine,
        found.clone,
        found.splice,
        found.identity,
        found.derived,
    )


def _module_path(
    model: nn.Module, name: str, blocks: Blocks | None, findings: Mapping[tuple[int, str], Finding]
) -> str:
    """Return the full path of the module with this path, given in full or relative to the base model."""
    modules = dict(model.named_modules())
    for path in (name, f"{getattr(model, 'base_model_prefix', '')}.{name}"):
        if path and path in modules:
            return path
    raise HookPointError(_unknown(model, name, blocks, findings))


def _widths(model: nn.Module, paths: Mapping[str, str]) -> dict[str, int]:
    """Measure the widths of modules' outputs over two contexts of three tokens."""
    hook_points = {name: ResolvedHookPoint(name, path, "output", None, 0) for name, path in paths.items()}
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in hook_points}
    if not hook_points:
        return {}
    with ExitStack() as stack, torch.inference_mode():
        for name, hook_point in hook_points.items():
            seen = shapes[name]
            stack.enter_context(
                reading(model, hook_point, lambda x, seen=seen: seen.append(tuple(getattr(x, "shape", ()))))
            )
        _forward(model, torch.zeros(2, 3, dtype=torch.long, device=input_device(model)))
    for name, seen in shapes.items():
        if len(seen) != 1 or len(seen[0]) != 3 or seen[0][:2] != (2, 3):
            raise HookPointError(
                f"hook point '{name}' ({paths[name]}): expected one activation of shape [2, 3, d] for [2, 3] tokens, "
                f"got {seen or 'none'}; name a module that processes every token once"
            )
    return {name: seen[0][2] for name, seen in shapes.items()}


def _layer_of(blocks: Blocks | None, path: str) -> int | None:
    match = re.match(rf"{re.escape(blocks.path)}\.(\d+)(\.|$)", path) if blocks else None
    return int(match[1]) if match else None


def _unknown(model: nn.Module, name: str, blocks: Blocks | None, findings: Mapping[tuple[int, str], Finding]) -> str:
    if not findings:
        blocks, findings = measure(model, {0})
    layer = min((layer for layer, _ in findings), default=0)
    kinds = [kind for kind in KINDS if (found := findings.get((layer, kind))) is not None and found.place is not None]
    here = ""
    if blocks is not None and kinds:
        last = len(blocks.modules) - 1
        here = f"blocks.N.KIND with N from 0 to {last} and KIND one of {', '.join(kinds)}; or "
    some = f"{blocks.path}.0" if blocks else next((path for path, _ in model.named_modules() if path), "")
    return (
        f"no hook point '{name}' in {type(model).__name__}; it has {here}any module path such as '{some}'; "
        "`thresher hooks MODEL` lists them"
    )


def _forward(model: nn.Module, input_ids: Tensor) -> None:
    """Run the model so that its hooks are called, without the unembedding if it has a base model."""
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    base(input_ids=input_ids, **({"use_cache": False} if hasattr(config, "use_cache") else {}))


def reading(
    model: nn.Module, hook_point: ResolvedHookPoint, reader: Callable[[Any], None]
) -> AbstractContextManager[None]:
    """Within this context, the model's forward passes call `reader` with the activation, on its `input_device`."""
    scale, affine, clone = hook_point.scale, hook_point.affine, hook_point.clone
    device = input_device(model)

    def pass_on(activation: Any) -> None:
        if isinstance(activation, Tensor) and activation.device != device:
            activation = activation.to(device)
        if scale != 1:
            activation = activation * scale
        elif clone:
            activation = activation.clone()
        reader(activation)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pass_on(_input(args, kwargs))

    def on_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        pass_on(activation_of(output) if affine is None else affine.normalize(_input(args, kwargs)))

    return _hooked(model, hook_point, on_input, on_output)


def _brought(replace: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return `replace` for activations on any device, of which it is given a copy on this one."""

    def on_device(activation: Tensor) -> Tensor:
        if activation.device == device:
            return replace(activation)
        there = activation.to(device)
        new = replace(there)
        return activation if new is there else new.to(activation.device)

    return on_device


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the activation among a module's arguments."""
    argument = input_argument(args, kwargs)
    assert argument is not None
    return kwargs[argument] if isinstance(argument, str) else args[argument]


@contextmanager
def _hooked(
    model: nn.Module, hook_point: ResolvedHookPoint, on_input: Callable[..., Any], on_output: Callable[..., Any]
) -> Iterator[None]:
    """Within this context, register the hook for a module's input or for its output, as the hook point requires."""
    module = model.get_submodule(hook_point.module_path)
    if hook_point.kind == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
