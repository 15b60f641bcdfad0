"""Read activations out of a forward pass that stops after the last of them, or replace one."""

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
from .probe.arguments import activation_of, input_place, with_input, with_output
from .probe.blocks import Blocks
from .probe.finding import Finding

NAMES_A_MODULE = "any module's path names that module's own output"
"""What there is beside the canonical names."""


class _Enough(BaseException):
    """Ends a forward pass once every hook point was read; nothing between may catch it."""


def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "batch context"],
    hook_points: Mapping[str, ResolvedHookPoint],
    truncate: bool = True,
) -> dict[str, Float[Tensor, "batch context d_in"]]:
    """Return the activation at every hook point, from one forward pass without gradients.

    With `truncate`, nothing after the last hook point runs: later layers, final norm and
    unembedding cost nothing.
    """
    with capturing(model, hook_points, truncate) as read:
        return read(input_ids)


@contextmanager
def capturing(
    model: nn.Module, hook_points: Mapping[str, ResolvedHookPoint], truncate: bool = True
) -> Iterator[Callable[[Int[Tensor, "batch context"]], dict[str, Float[Tensor, "batch context d_in"]]]]:
    """Within this context, give a function that captures; several threads may call it at once.

    The hooks are the model's, the activations they keep the calling thread's.
    """
    kept = threading.local()

    def keep(name: str) -> Callable[[Tensor], None]:
        def reader(activation: Tensor) -> None:
            activations: dict[str, Tensor] | None = getattr(kept, "activations", None)
            if activations is None:
                return
            activations[name] = activation.detach()
            if truncate and len(activations) == len(hook_points):
                raise _Enough

        return reader

    def read(input_ids: Tensor) -> dict[str, Tensor]:
        activations: dict[str, Tensor] = {}
        kept.activations = activations
        try:
            with torch.inference_mode():
                _forward(model, input_ids)
        except _Enough:
            pass
        finally:
            kept.activations = None
        missing = [name for name in hook_points if name not in activations]
        if missing:
            raise HookPointError(f"the forward pass of {type(model).__name__} never reached {', '.join(missing)}")
        return {name: activations[name] for name in hook_points}

    with ExitStack() as stack:
        for name, hook_point in hook_points.items():
            stack.enter_context(reading(model, hook_point, keep(name)))
        yield read


def splice(
    model: nn.Module,
    hook_point: ResolvedHookPoint,
    replace: Callable[[Float[Tensor, "batch context d_in"]], Float[Tensor, "batch context d_in"]],
) -> AbstractContextManager[None]:
    """Within this context, the model's forward passes use `replace(activation)` in place of it, in all that follows.

    Raises `HookPointError` where that was measured not to be possible.
    """
    check_splices(model, hook_point)
    scale, affine = hook_point.scale, hook_point.affine

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = input_place(args, kwargs)
        assert place is not None
        activation = kwargs[place] if isinstance(place, str) else args[place]
        new = replace(activation)
        if hook_point.splice == "replace":
            return with_input(args, kwargs, place, new)
        if new is not activation:
            activation.copy_(new)
        return None

    def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if affine is not None:
            new = affine.apply(module, replace(affine.normalize(_input(args, kwargs))))
        elif scale != 1:
            new = replace(activation_of(output) * scale) / scale
        else:
            new = replace(activation_of(output))
        return with_output(output, new)

    return _hooked(model, hook_point, on_input, on_output)


def check_splices(model: nn.Module, hook_point: ResolvedHookPoint) -> None:
    """Raise `HookPointError` for a hook point where no other activation can take the place of the model's."""
    if not hook_point.splice:
        raise HookPointError(
            f"nothing can be spliced in at '{hook_point.name}' in {type(model).__name__}: putting another activation "
            f"into {hook_point.module_path} changes only some, or more, of what the name stands for; "
            "expected a hook point whose splice `thresher hooks` calls possible"
        )


def resolve_hook_points(model: nn.Module, names: Iterable[str]) -> dict[str, ResolvedHookPoint]:
    """Find hook points in a model by canonical name, SAELens spelling or module path.

    A few tokens run through the model to measure the identity of each canonical name and each width. Raises
    `HookPointError`, listing what the model has, for a name it lacks or whose identity does not hold, and for a module
    whose output is not one `[batch, context, d]` activation a pass.
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
    """Return a hook point of a block from what was measured, or raise `HookPointError` with the reason."""
    found = findings.get((layer, kind))
    if found is None:
        raise HookPointError(_unknown(model, name, blocks, findings))
    if found.place is None:
        assert blocks is not None
        raise HookPointError(
            f"no hook point '{name}' in {type(model).__name__}: {found.reason}; `thresher hooks MODEL` lists those it "
            f"has, and {NAMES_A_MODULE}, such as '{blocks.path}.{layer}'"
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
    """Return the path of a module that is named by it, whole or below the base model."""
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
        _forward(model, torch.zeros(2, 3, dtype=torch.long, device=next(model.parameters()).device))
    for name, seen in shapes.items():
        if len(seen) != 1 or len(seen[0]) != 3 or seen[0][:2] != (2, 3):
            raise HookPointError(
                f"hook point '{name}' ({paths[name]}) must give one activation of shape "
                f"[2, 3, d] for [2, 3] tokens, got {seen or 'none'}; name a module on the path of the tokens"
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
    """Run the model for its hooks' sake, without the unembedding where it has a base model."""
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    base(input_ids=input_ids, **({"use_cache": False} if hasattr(config, "use_cache") else {}))


def reading(
    model: nn.Module, hook_point: ResolvedHookPoint, reader: Callable[[Any], None]
) -> AbstractContextManager[None]:
    """Within this context, the model's forward passes call `reader` with the activation."""
    scale, affine, clone = hook_point.scale, hook_point.affine, hook_point.clone

    def give(activation: Any) -> None:
        if scale != 1:
            activation = activation * scale
        elif clone:
            activation = activation.clone()
        reader(activation)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        give(_input(args, kwargs))

    def on_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        give(activation_of(output) if affine is None else affine.normalize(_input(args, kwargs)))

    return _hooked(model, hook_point, on_input, on_output)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the activation among a module's arguments."""
    place = input_place(args, kwargs)
    assert place is not None
    return kwargs[place] if isinstance(place, str) else args[place]


@contextmanager
def _hooked(
    model: nn.Module, hook_point: ResolvedHookPoint, on_input: Callable[..., Any], on_output: Callable[..., Any]
) -> Iterator[None]:
    """Within this context, call one of the hooks, as the hook point is a module's input or its output."""
    module = model.get_submodule(hook_point.module_path)
    if hook_point.kind == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
