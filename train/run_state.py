"""Where a run is on disk: its configuration, its checkpoint, and the SAEs it has finished."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from ..shared.config import read_toml, to_toml
from ..shared.errors import ConfigError
from .batches import ShuffledBatches
from .checkpoint import load_record, load_state, save_record, save_state, write_atomically
from .config import TrainConfig
from .parallel.latents import is_sharded
from .parallel.layout import Layout
from .plan import Plan
from .sae_trainer import SaeTrainer

if TYPE_CHECKING:
    from ..shared.store import ActivationStore

CONFIG_NAME = "config.toml"
DIVERGED_NAME = "diverged.json"
_MAY_CHANGE = {
    "checkpoint_every_tokens",
    "keep_checkpoints",
    "log_every_steps",
    "tensorboard",
    "wandb",
    "wandb_project",
    "dry_run",
    "cuda_graphs",
    "parallel",
    "tokens",
    "epochs",
    "store",
    "cache",
    "cache_bytes",
    "output",
}
"""Keys that may differ on resuming: they do not change the result, or what they decide is compared instead."""


class RunState:
    """An output folder's run. `step` counts the steps that are done.

    All ranks call the same methods at the same steps. Each SAE's files are written by one rank, and all that is shared
    by the first, from tensors in full: another number of ranks can go on from them.

    Raises:
        ConfigError: the folder holds a run of another configuration or of another store.
    """

    def __init__(self, config: TrainConfig, plan: Plan, store: ActivationStore, layout: Layout):
        self.output = Path(config.output)
        self.step = 0
        self._keep = config.keep_checkpoints
        self._plan = plan
        self._layout = layout
        kind = torch.device(config.device).type
        self._config = msgspec.structs.replace(config, sae=list(plan.saes), device=kind)
        self._metadata = _sae_metadata(store)
        self._identity = {"n_steps": plan.schedule.n_steps, "rows_per_epoch": plan.rows_per_epoch}
        self._record = layout.ranks.from_first(load_record(self.output) if layout.ranks.first else None)
        if self._record is not None:
            self._check_same(self._record)
        elif layout.ranks.first:
            self.output.mkdir(parents=True, exist_ok=True)
            write_atomically(self.output / CONFIG_NAME, to_toml(self._config))

    @property
    def finished(self) -> bool:
        """Return whether nothing is left to do."""
        return bool(self._record and self._record["finished"])

    def folders(self) -> list[Path]:
        """Return the folders of the SAEs that trained to the end."""
        diverged = self._record["diverged"] if self._record else {}
        return [self.output / str(sae.name) for sae in self._plan.saes if sae.name not in diverged]

    def resume(self, trainers: list[SaeTrainer], batches: ShuffledBatches) -> None:
        """Bring trainers and stream to the last checkpoint, if there is one."""
        if self._record is None:
            return
        self.step = self._record["step"]
        batches.load_state_dict(self._record["stream"])
        for trainer in trainers:
            trainer.diverged = self._record["diverged"].get(trainer.name)
            if trainer.diverged is None:
                rows = self._layout.latents_here(trainer.config.d_sae)
                trainer.load_state_dict(load_state(self.output, trainer.name, self.step, rows, is_sharded))

    def checkpoint(self, trainers: list[SaeTrainer], batches: ShuffledBatches) -> None:
        """Save everything that the rest of the run depends on."""
        for trainer in trainers:
            trainer.check()
        for trainer in trainers:
            if trainer.diverged is None:
                state = self._layout.whole(trainer.name, trainer.state_dict(), trainer.config.d_sae)
                if self._layout.saves(trainer.name):
                    save_state(self.output, trainer.name, self.step, state)
        self._save_record(trainers, batches.state_dict(), finished=False)

    def record_divergence(self, trainers: list[SaeTrainer]) -> None:
        """Say beside each SAE that diverged why it has no weights."""
        for trainer in filter(lambda trainer: self._layout.saves(trainer.name), trainers):
            path = self.output / trainer.name / DIVERGED_NAME
            if trainer.diverged is not None and not path.exists():
                path.write_text(json.dumps({"reason": trainer.diverged, "lr": trainer.architecture.lr}) + "\n")

    def all_diverged(self, trainers: list[SaeTrainer]) -> ConfigError:
        """Return the error that no SAE is left."""
        last = trainers[-1]
        return ConfigError(f"all SAEs diverged, '{last.name}' with {last.diverged}; lower the learning rates")

    def finish(self, trainers: list[SaeTrainer]) -> list[Path]:
        """Write the trained SAEs, mark the run as finished and return their folders.

        Raises:
            ConfigError: no SAE is left.
        """
        if len(self._diverged(trainers)) == len(self._plan.saes):
            raise self.all_diverged(trainers)
        for trainer in trainers:
            if trainer.diverged is None:
                parameters = self._layout.whole(trainer.name, trainer.trained_parameters, trainer.config.d_sae)
                if not self._layout.saves(trainer.name):
                    continue
                folder = trainer.to_sae(self._metadata, parameters).save(self.output / trainer.name)
                own = msgspec.structs.replace(self._config, sae=[trainer.config])
                write_atomically(folder / CONFIG_NAME, to_toml(own))
        self._save_record(trainers, None, finished=True)
        return self.folders()

    def _diverged(self, trainers: list[SaeTrainer]) -> dict[str, str]:
        """Return which SAEs of all ranks diverged, and why; all have come here when it returns."""
        own = {t.name: t.diverged for t in trainers if t.diverged is not None}
        return {name: reason for every in self._layout.ranks.gather(own) for name, reason in every.items()}

    def _save_record(self, trainers: list[SaeTrainer], stream: Any, finished: bool) -> None:
        diverged = self._diverged(trainers)
        self._record = {
            "step": self.step,
            "finished": finished,
            "stream": stream,
            "diverged": diverged,
            **self._identity,
        }
        if self._layout.ranks.first:
            save_record(self.output, self._record, self._keep)
        self._layout.ranks.gather(None)

    def _check_same(self, record: Mapping[str, Any]) -> None:
        saved = read_toml(self.output / CONFIG_NAME)
        current = tomllib.loads(to_toml(self._config))
        differing = [key for key in sorted(saved.keys() | current.keys()) if saved.get(key) != current.get(key)]
        differing = [key for key in differing if key not in _MAY_CHANGE]
        if "sae" in differing:
            differing.remove("sae")
            differing += _differing_saes(saved.get("sae", []), current["sae"])
        differing += [key for key, value in self._identity.items() if record.get(key) != value]
        if differing:
            raise ConfigError(
                f"'{self.output}' holds a run of another configuration; differing: {', '.join(differing)}; "
                "restore them, or choose another output"
            )


def _differing_saes(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> list[str]:
    before, now = ({sae["name"]: sae for sae in saes} for saes in (saved, current))
    differing = [f"sae '{name}' (only one has it)" for name in sorted(before.keys() ^ now.keys())]
    for name in sorted(before.keys() & now.keys()):
        keys = sorted(before[name].keys() | now[name].keys())
        differing += [f"sae '{name}'.{key}" for key in keys if before[name].get(key) != now[name].get(key)]
    return differing or ["sae (in another order)"]


def _sae_metadata(store: ActivationStore) -> dict[str, Any]:
    said = store.metadata
    roles = {} if store.used_roles is None else {"roles": list(store.used_roles)}
    return {
        **roles,
        "model_name": said.get("model"),
        "dataset_path": said.get("dataset"),
        "context_size": store.context_size,
        "prepend_bos": said.get("bos_token_id") is not None,
    }
