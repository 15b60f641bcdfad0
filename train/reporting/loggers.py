"""Loggers besides `metrics.jsonl`: TensorBoard and Weights & Biases, if they are installed and enabled."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...shared.core.config import read_toml
from ...shared.core.errors import ConfigError, MissingFileError

if TYPE_CHECKING:
    from ..config import TrainConfig

_WANDB_ID_NAME = "wandb-id.txt"


class Logger(Protocol):
    """A log of one SAE's metrics."""

    def write(self, step: int, tokens: int, numbers: Mapping[str, float]) -> None:
        """Log a step's numbers."""
        ...

    def close(self) -> None:
        """Finish the log."""
        ...


def loggers_of(config: TrainConfig, folder: Path, resume_step: int) -> list[Logger]:
    """Return the loggers that a configuration asks for, for the SAE in a folder.

    Raises:
        ConfigError: a logger is not installed or cannot start, such as W&B without a key.
    """
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(folder, resume_step))
    if config.wandb != "off":
        loggers.append(WeightsAndBiases(config, folder))
    return loggers


class TensorBoard:
    """Event files in the SAE's folder `tensorboard`; events after the step that a run resumes from are hidden."""

    def __init__(self, folder: Path, resume_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("tensorboard = true needs TensorBoard; install 'thresher[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, tokens: int, numbers: Mapping[str, float]) -> None:
        """Add a point to each number's curve."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Write pending events."""
        self._writer.close()


class WeightsAndBiases:
    """One run per SAE, grouped by the output folder; an offline run is in the SAE's folder `wandb`.

    A resumed run keeps its id. Steps that it repeats are identical, and W&B ignores them.
    """

    def __init__(self, config: TrainConfig, folder: Path):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(f"wandb = '{config.wandb}' needs Weights & Biases; install 'thresher[wandb]'") from None
        id_path = folder / _WANDB_ID_NAME
        if not id_path.exists():
            id_path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                group=folder.parent.name,
                name=folder.name,
                id=id_path.read_text(encoding="utf-8").strip(),
                config=_sae_table(folder),
                dir=str(folder),
                mode="offline" if config.wandb == "offline" else "online",
                resume="allow" if config.wandb == "online" else None,
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb = '{config.wandb}' could not start a run: {str(error).rstrip('. ')}; "
                "log in with `wandb login`, or give wandb = 'offline' and send it later with `wandb sync`"
            ) from error

    def write(self, step: int, tokens: int, numbers: Mapping[str, float]) -> None:
        """Log a step."""
        self._run.log({"tokens": tokens, **numbers}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _sae_table(folder: Path) -> dict[str, Any]:
    """Return the table of a folder's SAE in the run's recorded configuration."""
    try:
        tables = read_toml(folder.parent / "config.toml").get("sae", [])
    except MissingFileError:
        return {}
    return next((table for table in tables if table.get("name") == folder.name), {})
