"""Find and replace the activation among a module's arguments and results."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def input_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Return the index or name of the activation's argument: `hidden_states`, else the first tensor, else None."""
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return index
    return next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], argument: int | str, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a module's arguments with the activation replaced by `new`."""
    if isinstance(argument, str):
        return args, kwargs | {argument: new}
    return (*args[:argument], new, *args[argument + 1 :]), kwargs


def activation_of(output: Any) -> Any:
    """Return the activation in a module's output: the first element of a tuple or list, else the output itself."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_output(output: Any, new: Tensor) -> Any:
    """Return a module's output with the activation replaced by `new`."""
    if not isinstance(output, (tuple, list)):
        return new
    fields: Any = getattr(output, "_fields", None)
    if fields is not None:  # a named tuple
        return type(output)(new, *output[1:])
    return type(output)([new, *output[1:]])
