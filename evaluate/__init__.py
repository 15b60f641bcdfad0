"""Stage three: evaluate SAEs on a store, with or without the model, and write metrics and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shared.core.lazy import lazy_exports, make_callable

if TYPE_CHECKING:
    from .config import EvaluateConfig as EvaluateConfig
    from .run import evaluate as evaluate

__getattr__ = lazy_exports(__name__, {"EvaluateConfig": ".config", "evaluate": ".run"})
make_callable(__name__, "evaluate")
