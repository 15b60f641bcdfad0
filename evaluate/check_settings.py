"""Check the settings against the store before any work starts."""

from __future__ import annotations

from pathlib import Path

from ..shared.core.disk import check_output
from ..shared.core.errors import ConfigError, StoreError
from ..shared.sae.formats.files import CONFIG_NAME as SAE_CONFIG_NAME
from ..shared.store import ActivationStore
from .config import EvaluateConfig

RUN_RECORD_NAME = "checkpoint.json"
"""A file that `thresher train` writes in its output folder."""


def check_settings(config: EvaluateConfig, store: ActivationStore) -> None:
    """Check the export, the probes and the output folder.

    Raises:
        ConfigError: an export without a feature index, or an output inside the store or in the folder of an SAE or run.
        OutputError: the output is not a folder or is not writable.
        StoreError: a setting needs tokens, and the store holds none.
    """
    if config.export and config.feature_rows == 0:
        raise ConfigError("export writes the feature index, but feature_rows is 0; set it above 0, or export nothing")
    for key in ("export", "probe_tasks"):
        if getattr(config, key) and not store.has_tokens:
            raise StoreError(f"{key} needs tokens, and store '{store.path}' contains none; leave {key} out")
    output = Path(config.output)
    check_output(output, store.path)
    _check_replaces_nothing(output)


def _check_replaces_nothing(output: Path) -> None:
    """Raise `ConfigError` if the output is the folder of an SAE or of a training run."""
    for name, what in ((SAE_CONFIG_NAME, "an SAE"), (RUN_RECORD_NAME, "a training run")):
        if (output / name).exists():
            raise ConfigError(
                f"the output '{output}' is the folder of {what}, and the evaluation would overwrite its config.toml; "
                f"choose another folder, such as '{output / 'evaluation'}'"
            )
