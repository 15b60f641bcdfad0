"""Make Triton's interpreter fit for rehearsals and tests on a machine without a GPU.

A script whose command line has `--rehearse` imports this before anything imports Triton.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REHEARSED = "--rehearse" in sys.argv
if REHEARSED:
    os.environ["TRITON_INTERPRET"] = "1"


@contextmanager
def fit_interpreter() -> Iterator[None]:
    """Spare the interpreter its dearest work, and let Triton 3.6's run with NumPy 2.4 and later.

    At every call of a device function the interpreter wraps all of `triton.language` anew, 2 ms for each `tl.sum`; once
    per launch and module is enough. NumPy 2.4 no longer converts an array that has a dimension to a number, as Triton
    3.6 asks of an array of one element.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()
    was = interpreter._patch_lang, interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__
    patch, patch_tensor, launch = was

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def patch_index_too(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    try:
        interpreter._patch_lang = patch_once
        interpreter._patch_lang_tensor = patch_index_too
        interpreter.GridExecutor.__call__ = launch_afresh
        yield
    finally:
        interpreter._patch_lang, interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__ = was
