"""Imports that wait until they are needed, so that `thresher --help` need not import torch, and take less time then."""

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
    """Let a package be called as its function `name`.

    `thresher.train` is a package, and `from thresher import train` is to give what trains: it is both.
    """

    class Stage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, name)(*args, **kwargs)

    sys.modules[package].__class__ = Stage


@contextmanager
def fast_imports() -> Iterator[None]:
    """Within this context garbage is not looked for, and what many imports made never is, until the process ends.

    A large library makes hundreds of thousands of objects that stay, and hardly any garbage: to look through them
    again and again takes a fifth of the time of its import, and as much once more in what follows.
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
