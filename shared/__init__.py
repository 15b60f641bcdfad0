"""What the stages agree on: the store, SAEs, model hooks, configuration and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core.lazy import lazy_exports

if TYPE_CHECKING:
    from .sae import Sae as Sae
    from .store import ActivationStore as ActivationStore
    from .store import ActivationStoreWriter as ActivationStoreWriter

__getattr__ = lazy_exports(__name__, {"ActivationStore": ".store", "ActivationStoreWriter": ".store", "Sae": ".sae"})
