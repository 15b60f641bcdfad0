"""Which of a module's arguments and results is the activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def input_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Return which argument of a module is the activation: `hidden_states`, else the first tensor, else None."""
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return place
    return next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a module's arguments with another activation."""
    if isinstance(place, str):
        return args, kwargs | {place: new}
    return (*args[:place], new, *args[place + 1 :]), kwargs


def activation_of(output: Any) -> Any:
    """Return the activation among what a module returned: the first of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_output(output: Any, new: Tensor) -> Any:
    """Return what a module returned with another activation."""
    if not isinstance(output, (tuple, list)):
        return new
    fields: Any = getattr(output, "_fields", None)
    if fields is not None:  # a named tuple
        return type(output)(new, *output[1:])
    return type(output)([new, *output[1:]])
