"""Check at run time that arrays have the shapes and types that annotations say, in all functions that name them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

PACKAGES = [f"thresher.{stage}" for stage in ("shared", "harvest", "train", "evaluate")]

_SHAPE = re.compile(r"\[(np\.)?(Tensor|ndarray), f?['\"]")
_own_sizes = jaxtyping.jaxtyped("context")
"""Within it a dimension's name stands for a size of its own; `jaxtyped` itself would also change errors' texts."""
n_checked = 0


def install() -> None:
    """Let jaxtyping's import hook check every function that names shapes, in modules that are imported from now on.

    The hook decorates all functions with `jaxtyping.jaxtyped`, which takes longer than most of them. Here that name
    stands for `checked`, which leaves functions without shapes as they are.
    """
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook(PACKAGES, None)


def checked(*, typechecker: None) -> Callable[[Any], Any]:
    """Return the decorator that the import hook applies; like jaxtyping's, it sees what `staticmethod` has made."""
    return _check


def _check(function: Any) -> Any:
    if isinstance(function, staticmethod | classmethod):
        return type(function)(_check(function.__func__))
    if isinstance(function, property):
        return property(*(part and _check(part) for part in (function.fget, function.fset, function.fdel)))
    if inspect.isclass(function) or not hasattr(function, "__annotations__"):
        return function
    if inspect.isgeneratorfunction(
        function
    ):  # it begins after the call, within the sizes of the function that iterates
        return function
    shapes = {name: kind for name, kind in function.__annotations__.items() if _SHAPE.search(str(kind))}
    if not shapes:
        return function
    global n_checked
    n_checked += 1
    # Other annotations are the type checker's: many name classes that are imported for it alone.
    function.__annotations__ = shapes
    strict = beartype(function)

    @functools.wraps(strict)
    def with_own_sizes(*args: Any, **kwargs: Any) -> Any:
        with _own_sizes:
            return strict(*args, **kwargs)

    return with_own_sizes
