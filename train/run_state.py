"""The state of a run on disk: its configuration, its checkpoints and its finished SAEs."""

from __future__ import annotations

import dataclasses
import json
import logging
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from ..shared.core.config import read_toml, to_toml
from ..shared.core.disk import write_file, writing
from ..shared.core.errors import ConfigError
from ..shared.model.content import stored_model_content
from ..shared.sae.formats.files import CONFIG_NAME as SAE_CONFIG_NAME
from ..shared.sae.formats.files import DIVERGED_NAME
from ..shared.sae.formats.files import WEIGHTS_NAME as SAE_WEIGHTS_NAME
from .checkpoints.checkpoint import fault_of, load_state, remove_saes, remove_states, sae_path, save_state, state_path
from .checkpoints.normalizations import begin_normalizations
from .checkpoints.record import Checkpoint, RunRecord, load_record, save_record
from .config import SaeConfig, TrainConfig
from .parallel.latents import is_per_latent
from .parallel.layout import Layout
from .parallel.ranks import TrainRanks
from .plan import TrainPlan
from .recipes import LARGEST_BATCH, PUBLISHED_WARMUP_STEPS, ROTATED_KINDS, Began
from .same_run import Difference, Request, compare_run
from .step.sae_trainer import SaeTrainer
from .stream.batches import ShuffledBatches
from .stream.normalization import Normalization, RowScale
from .stream.row_mask import Half

if TYPE_CHECKING:
    from ..shared.store import ActivationStore

_log = logging.getLogger(__name__)

_CONFIG_NAME = "config.toml"


def began_with(output: Path) -> Began | None:
    """Return the settings with which the run in a folder began, if there is one."""
    record, _ = load_record(output)
    if record is None:
        return None
    warmup_steps = PUBLISHED_WARMUP_STEPS if record.warmup_steps is None else record.warmup_steps
    rotated_kinds = () if record.axes is None else tuple(record.rotated_kinds or ("sae",))
    return Began(record.batch_size or LARGEST_BATCH, warmup_steps, rotated_kinds, record.settings)


class RunState:
    """The run in an output folder. `step` counts finished steps; `plan` covers the SAEs that are still to be trained.

    All ranks call the same methods at the same steps. One rank writes each SAE's files, and the first rank everything
    that is shared. Files hold whole tensors, so that another number of ranks can resume from them.

    Raises:
        ConfigError: the folder holds a run of another configuration or of another store.
    """

    def __init__(self, config: TrainConfig, plan: TrainPlan, store: ActivationStore, ranks: TrainRanks):
        self.output = Path(config.output)
        self.step = 0
        self._keep = config.keep_checkpoints
        self._ranks = ranks
        self._config = msgspec.structs.replace(config, sae=list(plan.saes), device=torch.device(config.device).type)
        self._table = tomllib.loads(to_toml(self._config))
        self._metadata = _sae_metadata(store, config.documents)
        self._whole_plan = plan
        request = Request.of(self._table, plan, store)
        loaded = ranks.from_first(self._load() if ranks.first else None)
        assert loaded is not None
        record, saved, notes = loaded
        for note in notes:
            self._say(f"note: {note}")
        difference = compare_run(self.output, record, saved, request, store) if record else Difference()
        self._on_disk = record
        self._record = RunRecord(
            step=0, finished=False, n_steps=request.n_steps, diverged={}, lengths=[request.n_steps], row_scales={}
        )
        if record is None:
            self._record.rotated_kinds = list(ROTATED_KINDS)
        else:
            self._record = msgspec.structs.replace(record)
            if record.store is None and not record.finished:
                self._say(
                    "note: this run was begun by a release that did not record which store it trained on; "
                    "whether this is the same one cannot be checked"
                )
        self._record.rows_per_epoch, self._record.store = request.rows_per_epoch, request.store
        self._record.recipes = request.recipes
        self._record.config = self._table
        if record is None or record.settings is not None:
            self._record.batch_size = plan.schedule.batch_size
            self._record.warmup_steps = plan.schedule.warmup_steps
            self._record.settings = {
                name: {key: setting.value for key, setting in settings.items()}
                for name, settings in plan.settings.items()
            }
        if difference.continued:
            self._continue(request.n_steps)
        elif difference.retried:
            self._retry(difference.retried)
        elif self.finished and self._lacks_an_sae():
            self._record.finished, self._record.pending = False, [str(sae.name) for sae in self._healthy()]
        elif not self.finished and self._record.pending is None:
            self._record.pending = [str(sae.name) for sae in plan.saes]
        pending = self._record.pending or []
        self.plan = dataclasses.replace(
            plan,
            saes=tuple(sae for sae in plan.saes if sae.name in pending),
            schedule=plan.schedule._replace(earlier_n_steps=tuple(self._record.lengths[:-1])),
            n_parameters={name: n for name, n in plan.n_parameters.items() if name in pending},
        )
        self.layout = Layout(ranks) if self.finished else Layout.of(config.parallel, self.plan.n_parameters, ranks)
        if difference.continued or difference.retried:
            self._write()
        if ranks.first and not self.finished:
            self._remove_leftovers(difference.retried)
            write_file(self.output / _CONFIG_NAME, to_toml(self._config).encode())

    def _load(self) -> tuple[RunRecord | None, dict[str, Any], list[str]]:
        record, notes = load_record(self.output)
        if record is None or record.config is not None:
            return record, (record.config or {}) if record else {}, notes
        return record, read_toml(self.output / _CONFIG_NAME), notes

    def normalizations(self, store: ActivationStore) -> dict[str, Normalization]:
        """Return the normalisation of each hook point with which the run began or begins; all ranks call this."""
        saes, rotates = self._whole_plan.saes, self._whole_plan.rotates
        places = sorted({place for sae in saes for place in sae.wiring.hook_points})
        rotated = {place for sae in saes if sae.name in rotates for place in sae.wiring.hook_points}
        return begin_normalizations(self._config, places, rotated, self._record, store, self._ranks)

    @property
    def row_scales(self) -> dict[str, RowScale]:
        """Return how the run scales the rows of each hook point, once `normalizations` was called."""
        return self._record.row_scales or {}

    @property
    def finished(self) -> bool:
        """Return whether nothing is left to do."""
        return self._record.finished

    @property
    def diverged(self) -> dict[str, str]:
        """Return which SAEs of the sweep diverged, and why."""
        names = [str(sae.name) for sae in self._whole_plan.saes]
        return {name: self._record.diverged[name] for name in names if name in self._record.diverged}

    def folders(self) -> list[Path]:
        """Return the folders of the SAEs that trained to the end."""
        return [self.output / str(sae.name) for sae in self._healthy()]

    def _healthy(self) -> list[SaeConfig]:
        return [sae for sae in self._whole_plan.saes if sae.name not in self._record.diverged]

    def _lacks_an_sae(self) -> bool:
        """Return whether a file of a trained SAE is gone and its final state is not."""
        newest = self._record.checkpoints[:1]
        there = bool(newest) and newest[0].step == self._record.n_steps
        files = (SAE_CONFIG_NAME, SAE_WEIGHTS_NAME)
        gone = [folder for folder in self.folders() if not all((folder / name).is_file() for name in files)]
        return self._ranks.from_first(there and bool(gone))

    def _continue(self, n_steps: int) -> None:
        """Continue a finished run from its final state."""
        record, before = self._record, self._record.n_steps
        names = [str(sae.name) for sae in self._healthy()]
        newest = record.checkpoints[:1]
        if not newest or newest[0].step != before or not set(names) <= newest[0].files.keys():
            raise ConfigError(
                f"the run in '{self.output}' did not keep its final state, so it cannot be continued; "
                "train in another output, with init_from to start from these SAEs"
            )
        schedule = self._whole_plan.schedule
        record.finished, record.n_steps, record.pending, record.trained = False, n_steps, names, {}
        record.lengths = [*record.lengths, n_steps]
        falls = n_steps - round(n_steps * schedule.decay_fraction)
        batch = schedule.batch_size
        self._say(
            f"continuing from step {before:,} ({before * batch:,} tokens) to step {n_steps:,} ({n_steps * batch:,} "
            "tokens): the learning rate is that of a run of the new length, without another warm-up, and falls from "
            f"step {falls:,}"
        )

    def _retry(self, names: tuple[str, ...]) -> None:
        """Start to train again the SAEs that diverged in a finished run, without the others."""
        record = self._record
        final = record.checkpoints[0].files if record.checkpoints else {}
        now = {str(sae.name) for sae in self._whole_plan.saes}
        record.diverged = {name: why for name, why in record.diverged.items() if name in now and name not in names}
        kept = {str(sae.name) for sae in self._healthy()} - set(names)
        record.trained = {name: checksum for name, checksum in final.items() if name in kept}
        record.step, record.finished, record.pending, record.checkpoints = 0, False, list(names), []
        self._say(f"training again what diverged: {', '.join(names)}; the other SAEs stay as they are")

    def _remove_leftovers(self, retried: tuple[str, ...]) -> None:
        """Remove earlier files of SAEs that are trained again, and notes on SAEs that are no longer in the sweep."""
        for name in retried:
            remove_states(self.output, name, keep=())
            remove_saes(self.output, name)
            (self.output / name / DIVERGED_NAME).unlink(missing_ok=True)
        now = {str(sae.name) for sae in self._whole_plan.saes}
        for path in self.output.glob(f"*/{DIVERGED_NAME}"):
            if path.parent.name not in now:
                path.unlink()

    def resume(self, trainers: list[SaeTrainer], batches: ShuffledBatches) -> None:
        """Restore trainers and stream from the newest undamaged checkpoint, or leave them at the start."""
        while self._record.checkpoints:
            checkpoint = self._record.checkpoints[0]
            faults = [fault for some in self._ranks.gather(self._faults(checkpoint, trainers)) for fault in some]
            if not faults:
                self._go_to(checkpoint, trainers, batches)
                return
            self._record.checkpoints = self._record.checkpoints[1:]
            older = self._record.checkpoints
            instead = f"the checkpoint before it, at step {older[0].step:,}" if older else "the start of the run"
            if self._ranks.first:
                _log.warning(f"{faults[0]}; resuming from {instead}")
        pending = set(self._record.pending or [])
        self._record.diverged = {name: why for name, why in self._record.diverged.items() if name not in pending}
        self._remove_notes(trainers)

    def _remove_notes(self, trainers: list[SaeTrainer]) -> None:
        """Remove the notes on SAEs that had not yet diverged at the step where the run resumes."""
        for trainer in trainers:
            if trainer.diverged is None and self.layout.saves(trainer.name):
                (self.output / trainer.name / DIVERGED_NAME).unlink(missing_ok=True)

    def _faults(self, checkpoint: Checkpoint, trainers: list[SaeTrainer]) -> list[str]:
        """Return what is wrong with the files that this rank saved."""
        faults = []
        for trainer in trainers:
            if trainer.name not in checkpoint.diverged and self.layout.saves(trainer.name):
                path = state_path(self.output, trainer.name, checkpoint.step)
                known = not checkpoint.files or trainer.name in checkpoint.files
                fault = fault_of(path, checkpoint.files.get(trainer.name)) if known else "is missing"
                faults += [f"the checkpoint '{path}' {fault}"] if fault else []
        return faults

    def _go_to(self, checkpoint: Checkpoint, trainers: list[SaeTrainer], batches: ShuffledBatches) -> None:
        self.step = checkpoint.step
        batches.load_state_dict(checkpoint.stream)
        others = {name: why for name, why in self._record.diverged.items() if name not in (self._record.pending or [])}
        self._record.diverged = others | checkpoint.diverged
        for trainer in trainers:
            trainer.diverged = checkpoint.diverged.get(trainer.name)
            if trainer.diverged is None:
                rows = self.layout.latents_here(trainer.config.d_sae)
                state = load_state(self.output, trainer.name, self.step, rows, is_per_latent)
                try:
                    trainer.load_state_dict(state)
                except (KeyError, RuntimeError) as error:
                    path = state_path(self.output, trainer.name, self.step)
                    raise ConfigError(f"the checkpoint '{path}' does not fit this SAE: {error}") from None
        self._remove_notes(trainers)

    def checkpoint(self, trainers: list[SaeTrainer], batches: ShuffledBatches) -> None:
        """Save everything that the rest of the run depends on."""
        for trainer in trainers:
            trainer.check()
        files = {}
        for trainer in trainers:
            if trainer.diverged is None:
                state = self.layout.whole(trainer.name, trainer.state_dict(), trainer.config.d_sae)
                if self.layout.saves(trainer.name):
                    files[trainer.name] = save_state(self.output, trainer.name, self.step, state)
        checkpoint = Checkpoint(
            step=self.step,
            stream=batches.state_dict(),
            diverged=self._gather_diverged(trainers),
            files=_joined(self._ranks.gather(files)),
        )
        older = [old for old in self._record.checkpoints if old.step < self.step]
        self._record.checkpoints = [checkpoint, *older][: self._keep]
        self._save(trainers)

    def save_saes(self, trainers: list[SaeTrainer]) -> None:
        """Save the SAEs as they are now, beside those of other steps and what the run ends with."""
        read = {"step": self.step, "tokens": self.step * self.plan.schedule.batch_size}
        for trainer in trainers:
            if trainer.diverged is None:
                self._save_sae(trainer, sae_path(self.output, trainer.name, self.step), self._metadata | read)

    def _save_sae(self, trainer: SaeTrainer, folder: Path, metadata: dict[str, Any]) -> bool:
        """Save an SAE, if this rank does; all ranks that train it call this."""
        parameters = self.layout.whole(trainer.name, trainer.trained_parameters, trainer.config.d_sae)
        if self.layout.saves(trainer.name):
            with writing(folder):
                trainer.to_sae(metadata, parameters).save(folder)
        return self.layout.saves(trainer.name)

    def record_divergence(self, trainers: list[SaeTrainer]) -> None:
        """Report why each diverged SAE has no weights, on the terminal and in a file in its folder."""
        for trainer in trainers:
            if trainer.diverged is not None and self.layout.saves(trainer.name):
                path = self.output / trainer.name / DIVERGED_NAME
                if not path.exists():
                    content = {"reason": trainer.diverged, "lr": trainer.architecture.lr}
                    write_file(path, (json.dumps(content) + "\n").encode())
                    _log.warning(f"SAE '{trainer.name}' diverged: {trainer.diverged}")

    def has_healthy(self, trainers: list[SaeTrainer]) -> bool:
        """Return whether any SAE of the sweep has not diverged; if all have, mark the run as finished.

        All ranks call this after the same step.
        """
        self._record.diverged |= self._gather_diverged(trainers)
        if not self._healthy():
            self._record.finished = True
            self._save(trainers)
        return bool(self._healthy())

    def no_sae_left(self) -> ConfigError:
        """Return the error that all SAEs diverged."""
        last, why = list(self.diverged.items())[-1]
        return ConfigError(f"all SAEs diverged, '{last}' with {why}; lower the learning rates and run again")

    def finish(self, trainers: list[SaeTrainer], batches: ShuffledBatches) -> None:
        """Save the final state, write the trained SAEs, and mark the run as finished.

        Raises:
            ConfigError: no SAE is left.
        """
        if not self.has_healthy(trainers):
            raise self.no_sae_left()
        n_steps, batch_size = self.plan.schedule.n_steps, self.plan.schedule.batch_size
        files: dict[str, int] = {}
        if any(name not in self._record.diverged for name in self._record.pending or []):
            if not self._record.checkpoints or self._record.checkpoints[0].step != n_steps:
                self.checkpoint(trainers, batches)
            files = self._record.checkpoints[0].files
        for trainer in trainers:
            if trainer.diverged is None and self._save_sae(trainer, self.output / trainer.name, self._metadata):
                of_run = self._whole_plan.of_run_for(trainer.name)
                own = msgspec.structs.replace(self._config, sae=[trainer.config], **of_run)
                write_file(self.output / trainer.name / _CONFIG_NAME, to_toml(own).encode())
        final = Checkpoint(
            step=n_steps,
            stream=batches.state_dict() | {"rows_taken": n_steps * batch_size},
            diverged=self.diverged,
            files=self._record.trained | files,
        )
        older = [old for old in self._record.checkpoints if old.step < n_steps]
        self.step, self._record.checkpoints = n_steps, [final, *older][: self._keep]
        self._record.finished, self._record.pending, self._record.trained = True, [], {}
        self._save(trainers)

    def _gather_diverged(self, trainers: list[SaeTrainer]) -> dict[str, str]:
        """Return which SAEs in training diverged on any rank; waits for all ranks."""
        own = {trainer.name: trainer.diverged for trainer in trainers if trainer.diverged is not None}
        return _joined(self._ranks.gather(own))

    def _save(self, trainers: list[SaeTrainer]) -> None:
        """Write the record, then remove the state files that it does not name."""
        self._record.step = self.step
        self._record.diverged = self.diverged | self._gather_diverged(trainers)
        self._write()
        kept = [checkpoint.step for checkpoint in self._record.checkpoints]
        for trainer in trainers:
            if self.layout.saves(trainer.name):
                remove_states(self.output, trainer.name, kept)
        self._ranks.gather(None)

    def _write(self) -> None:
        if self._ranks.first:
            save_record(self.output, self._record, self._on_disk)
        self._on_disk = msgspec.structs.replace(self._record)

    def _say(self, sentence: str) -> None:
        if self._ranks.first:
            _log.info(sentence)


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _sae_metadata(store: ActivationStore, documents: Half | None = None) -> dict[str, Any]:
    said = store.metadata
    roles = {} if store.used_roles is None else {"roles": list(store.used_roles)}
    half = {} if documents is None else {"documents": documents}
    return {
        **roles,
        **half,
        "model_name": said.get("model"),
        "model_content": stored_model_content(said),
        "dataset_path": said.get("dataset"),
        "context_size": store.context_size,
        "prepend_bos": said.get("bos_token_id") is not None,
    }
