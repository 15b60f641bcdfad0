"""Lazy and faster imports, so that `thresher --help` does not import torch and other commands start sooner."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_MANY_MODULES = 500


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module `__getattr__` (PEP 562) that imports each name from its relative module.

    `modules` maps a public name to the module that holds it, such as
    `{"Sae": ".sae"}`.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name], package), name)

    return find


def make_callable(package: str, name: str) -> None:
    """Make a package callable as its function `name`.

    `thresher.train` is a package, but users expect `from thresher import train` to return the function; it is both.
    """

    class Stage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, name)(*args, **kwargs)

    sys.modules[package].__class__ = Stage


@contextmanager
def fast_imports() -> Iterator[None]:
    """Disable garbage collection during imports, and freeze the objects that a large import creates.

    A large library creates hundreds of thousands of objects and hardly any garbage. Collecting during its import takes
    a fifth of the time of the import, and later collections take as long again.
    """
    collects, n_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if len(sys.modules) - n_modules >= _MANY_MODULES:
                gc.freeze()
                atexit.register(gc.unfreeze)
            gc.enable()
