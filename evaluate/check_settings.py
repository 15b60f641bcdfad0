"""Refuse at once what the settings ask for and cannot have, rather than after hours of work."""

from __future__ import annotations

from pathlib import Path

from ..shared.core.disk import check_output
from ..shared.core.errors import ConfigError, StoreError
from ..shared.sae.formats.files import CONFIG_NAME as SAE_CONFIG_NAME
from ..shared.store import ActivationStore
from .config import EvaluateConfig

RUN_RECORD_NAME = "checkpoint.json"
"""What `thresher train` keeps in its output folder."""


def refuse(config: EvaluateConfig, store: ActivationStore) -> None:
    """Check what the settings ask for beyond the metrics.

    Raises:
        ConfigError: an export without an index to export, or an output that is the store's, an SAE's or a run's.
        OutputError: the output is no folder, or cannot be written.
        StoreError: the store has no tokens for what needs them.
    """
    if config.export and config.feature_rows == 0:
        raise ConfigError("export writes the feature index, but feature_rows is 0; set it above 0, or export nothing")
    for key in ("export", "probe_tasks"):
        if getattr(config, key) and not store.has_tokens:
            raise StoreError(f"store '{store.path}' holds no tokens, which {key} needs; leave {key} out")
    output = Path(config.output)
    check_output(output, store.path)
    _check_replaces_nothing(output)


def _check_replaces_nothing(output: Path) -> None:
    """Refuse an output whose files would replace those of an SAE or of a training run; raise `ConfigError`."""
    for name, what in ((SAE_CONFIG_NAME, "an SAE"), (RUN_RECORD_NAME, "a training run")):
        if (output / name).exists():
            raise ConfigError(
                f"the output '{output}' is the folder of {what}, whose config.toml the evaluation would replace; "
                f"choose another folder, such as '{output / 'evaluation'}'"
            )
