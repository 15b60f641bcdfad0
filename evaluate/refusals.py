"""Refuse at once what the settings ask for and cannot have, rather than after hours of work."""

from __future__ import annotations

from pathlib import Path

from ..shared.disk import check_writable
from ..shared.errors import ConfigError, StoreError
from ..shared.store import ActivationStore
from .config import EvaluateConfig


def refuse(config: EvaluateConfig, store: ActivationStore) -> None:
    """Check what the settings ask for beyond the metrics.

    Raises:
        ConfigError: an export without an index to export.
        OutputError: the output is no folder, or cannot be written.
        StoreError: the store has no tokens for what needs them.
    """
    if config.export and config.feature_rows == 0:
        raise ConfigError("export writes the feature index, but feature_rows is 0; set it above 0, or export nothing")
    for key in ("export", "probe_tasks"):
        if getattr(config, key) and not store.has_tokens:
            raise StoreError(f"store '{store.path}' holds no tokens, which {key} needs; leave {key} out")
    check_writable(Path(config.output))
