"""Run a model on a few tokens, replace some modules' inputs or outputs, and record those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..loading.placement import input_device
from .arguments import activation_of, input_argument, with_input, with_output

Side = Literal["input", "output"]
BATCH, CONTEXT = 2, 5


class Place(NamedTuple):
    """The activation at a module's input or output; `path` is the module's path in the model."""

    path: str
    side: Side


class ProbeEdit(NamedTuple):
    """Replace the activation at `place` by `value`; with `in_place`, write it into the existing tensor."""

    place: Place
    value: Tensor
    in_place: bool = False


class Stop(BaseException):
    """Ends a forward pass once everything is recorded. A `BaseException`, so that no model code catches it."""


@dataclass
class Record:
    """The inputs and outputs of the recorded modules in one pass, in call order.

    `values` holds copies made when the hooks ran, and `originals` the tensors themselves: if they differ later, the
    model has written into them. `repeated` holds the places of modules that ran more than once. The copies are all on
    `device`, also if the model is spread over several.
    """

    device: torch.device
    values: dict[Place, Float[Tensor, "batch context d"]] = field(default_factory=dict)
    originals: dict[Place, Tensor] = field(default_factory=dict)
    repeated: set[Place] = field(default_factory=set)
    flat: set[Place] = field(default_factory=set)
    output: Any = None

    def add(self, place: Place, value: Any) -> None:
        """Record a value if it is one activation per token; add its place to `flat` if it is `[batch * context, d]`."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if value.shape[:-1] == (BATCH * CONTEXT,):
            self.flat.add(place)
            value = value.view(BATCH, CONTEXT, -1) if value.is_contiguous() else value.reshape(BATCH, CONTEXT, -1)
        if value.shape[:-1] != (BATCH, CONTEXT):
            return
        if place in self.values:
            self.repeated.add(place)
        self.values[place] = value.detach().clone().to(self.device)
        self.originals[place] = value.detach()

    def changed(self) -> set[Place]:
        """Return the places whose tensors the model has written into since they were recorded."""
        return {
            place
            for place, value in self.values.items()
            if not torch.equal(value, self.originals[place].to(self.device))
        }


def probe_tokens(model: nn.Module) -> Int[Tensor, "batch context"]:
    """Return ordinary tokens, none of which has a special meaning in the configuration, such as an image token."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = (
        {value for part in (config, text) for key, value in vars(part).items() if "token" in key} if config else set()
    )
    size = getattr(text, "vocab_size", None) or BATCH * CONTEXT
    ordinary = [token for token in range(5, min(size, 200)) if token not in special] or list(range(size))
    tokens = [ordinary[i * 7 % len(ordinary)] for i in range(BATCH * CONTEXT)]
    return torch.tensor(tokens, device=input_device(model)).reshape(BATCH, CONTEXT)


def run_recorded(
    model: nn.Module,
    recorded: Iterable[tuple[str, nn.Module]],
    edits: Sequence[ProbeEdit] = (),
    stop_before: nn.Module | None = None,
    skipped: Mapping[nn.Module, Any] | None = None,
    **arguments: Any,
) -> Record:
    """Run the model with edits, without its unembedding, and record the inputs and outputs of the `recorded` modules.

    The pass ends at the module `stop_before`. The `skipped` modules do not run, and return the given outputs.
    """
    record = Record(input_device(model))
    base: Any = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    if hasattr(config, "use_cache"):
        arguments["use_cache"] = False
    with ExitStack() as stack, torch.inference_mode():
        for edit in edits:
            _hook(stack, model.get_submodule(edit.place.path), edit.place.side, _editor(edit))
        for path, module in recorded:
            for side in ("input", "output"):
                place = Place(path, side)
                _hook(stack, module, side, lambda value, place=place: record.add(place, value))
        for module, output in (skipped or {}).items():
            _skip(stack, module, output)
        if stop_before is not None:
            stack.callback(stop_before.register_forward_pre_hook(_stop).remove)
        try:
            record.output = base(input_ids=probe_tokens(model), **arguments)
        except Stop:
            pass
    return record


def _skip(stack: ExitStack, module: nn.Module, output: Any) -> None:
    """Make a module return copies of an earlier output's activation until the stack is closed."""
    activation: Tensor = activation_of(output)
    own = module.__dict__.get("forward")  # set by libraries that place a model on several devices

    def restore() -> None:
        del module.forward
        if own is not None:
            module.forward = own

    module.forward = lambda *_, **__: with_output(output, activation.clone())
    stack.callback(restore)


def _stop(*_: Any) -> None:
    raise Stop


def _editor(edit: ProbeEdit) -> Callable[[Any], Tensor | None]:
    def replace(value: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or value.numel() != edit.value.numel():
            return None
        new = edit.value.reshape(value.shape).to(value)
        if edit.in_place:
            value.copy_(new)
            return None
        return new.clone()

    return replace


def _hook(stack: ExitStack, module: nn.Module, side: Side, act: Callable[[Any], Tensor | None]) -> None:
    """Call `act` with the module's input or output, and replace it by the result unless that is None."""

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        argument = input_argument(args, kwargs)
        if argument is None:
            return None
        new = act(kwargs[argument] if isinstance(argument, str) else args[argument])
        return None if new is None else with_input(args, kwargs, argument, new)

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        new = act(activation_of(output))
        return None if new is None else with_output(output, new)

    if side == "input":
        stack.callback(module.register_forward_pre_hook(on_input, with_kwargs=True).remove)
    else:
        stack.callback(module.register_forward_hook(on_output).remove)
