"""Check at run time that arrays have the shapes and types that annotations say, in all functions that name them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_SHAPES = re.compile(r"\[(np\.)?(Tensor|ndarray), ")
n_checked = 0


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result, but only those whose annotations are shapes.

    Other annotations are the type checker's: many name classes that are imported for it alone.
    """
    global n_checked
    if inspect.isclass(function):
        return function
    kinds = {name: kind if isinstance(kind, str) else repr(kind) for name, kind in function.__annotations__.items()}
    shapes = {name: function.__annotations__[name] for name, kind in kinds.items() if _SHAPES.search(kind)}
    if not shapes:
        return function
    n_checked += 1
    function.__annotations__ = shapes
    return beartype(function)
