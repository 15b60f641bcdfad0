"""Read activations out of a forward pass that stops after the last of them, or replace one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .errors import HookPointError
from .hook_points import ResolvedHookPoint, locate, unique_canonical


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
            stack.enter_context(_reading(model, hook_point, keep(name)))
        yield read


def splice(
    model: nn.Module,
    hook_point: ResolvedHookPoint,
    replace: Callable[[Float[Tensor, "batch context d_in"]], Float[Tensor, "batch context d_in"]],
) -> AbstractContextManager[None]:
    """Within this context, the model's forward passes use `replace(activation)` in place of it."""

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place = _input_place(args, kwargs)
        if isinstance(place, str):
            return args, kwargs | {place: replace(kwargs[place])}
        return (*args[:place], replace(args[place]), *args[place + 1 :]), kwargs

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return replace(output)
        return (replace(output[0]), *output[1:])

    return _hooked(model, hook_point, on_input, on_output)


def resolve_hook_points(model: nn.Module, names: Iterable[str]) -> dict[str, ResolvedHookPoint]:
    """Find hook points in a model by canonical name, SAELens spelling or module path.

    A forward pass over two contexts of three tokens measures each width. Raises `HookPointError`, listing what the
    model has, for a name it lacks, and for a module whose output is not one `[batch, context, d]`
    activation a pass.
    """
    resolved = {}
    for name in unique_canonical(names):
        path, kind, layer = locate(model, name)
        resolved[name] = ResolvedHookPoint(name, path, kind, layer, 0)
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in resolved}
    with ExitStack() as stack, torch.inference_mode():
        for name, hook_point in resolved.items():
            seen = shapes[name]
            stack.enter_context(_reading(model, hook_point, lambda x, seen=seen: seen.append(tuple(x.shape))))
        _forward(model, torch.zeros(2, 3, dtype=torch.long, device=next(model.parameters()).device))
    widths = {}
    for name, seen in shapes.items():
        if len(seen) != 1 or len(seen[0]) != 3 or seen[0][:2] != (2, 3):
            raise HookPointError(
                f"hook point '{name}' ({resolved[name].module_path}) must give one activation of shape "
                f"[2, 3, d] for [2, 3] tokens, got {seen or 'none'}; name a module on the path of the tokens"
            )
        widths[name] = seen[0][2]
    return {
        name: ResolvedHookPoint(name, hook_point.module_path, hook_point.kind, hook_point.layer, widths[name])
        for name, hook_point in resolved.items()
    }


def _forward(model: nn.Module, input_ids: Tensor) -> None:
    """Run the model for its hooks' sake, without the unembedding where it has a base model."""
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    base(input_ids=input_ids, **({"use_cache": False} if hasattr(config, "use_cache") else {}))


def _reading(
    model: nn.Module, hook_point: ResolvedHookPoint, reader: Callable[[Any], None]
) -> AbstractContextManager[None]:
    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = _input_place(args, kwargs)
        reader(kwargs[place] if isinstance(place, str) else args[place])

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        reader(output if isinstance(output, Tensor) else output[0])

    return _hooked(model, hook_point, on_input, on_output)


@contextmanager
def _hooked(
    model: nn.Module, hook_point: ResolvedHookPoint, on_input: Callable[..., Any], on_output: Callable[..., Any]
) -> Iterator[None]:
    """Within this context, call one of the hooks, as the hook point is a module's input or its output."""
    module = model.get_submodule(hook_point.module_path)
    if hook_point.kind == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def _input_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Return which argument of a module is the activation: `hidden_states`, else the first tensor."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return place
    return next(key for key, value in kwargs.items() if isinstance(value, Tensor))
