"""Stage one: tokenize text, run a language model on it, and write its activations to a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shared.core.lazy import lazy_exports, make_callable

if TYPE_CHECKING:
    from .config import HarvestConfig as HarvestConfig
    from .run import harvest as harvest

__getattr__ = lazy_exports(__name__, {"HarvestConfig": ".config", "harvest": ".run"})
make_callable(__name__, "harvest")
