"""What a run takes, measured by a trial: a harvest of a few batches, and some steps of training on them."""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from thresher.harvest.config import HarvestConfig
from thresher.harvest.estimate import TOKEN_BYTES, Estimate, check_disk, human_bytes, human_seconds
from thresher.harvest.model.forward import choose_workers
from thresher.harvest.model.plan import make_plan
from thresher.harvest.progress import HarvestProgress
from thresher.harvest.steps import make_writer, run_model
from thresher.harvest.tokens.tokens import read_contexts
from thresher.shared.core.compute.device import choose_device
from thresher.shared.core.paths import user_path
from thresher.shared.core.terminal.logs import LogSettings, log_settings, shown_logs
from thresher.shared.store import ActivationStore, ActivationStoreWriter
from thresher.train.config import TrainConfig
from thresher.train.plan import plan_run
from thresher.train.run import train

BATCHES_PER_WORKER = 2
_MOST_BYTES = 512 << 20
_STEPS = {"cpu": 12, "cuda": 192}
"""Steps of the trial; on a GPU their speed is known every 64 steps."""


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes, in bytes, rows per second and seconds; `lines` says it in words."""

    device: str
    row_bytes: float
    sae_bytes: int
    n_saes: int
    harvest_speed: float
    train_speed: float
    harvest_memory: int
    train_memory: int
    trial_seconds: float

    def lines(self, harvest: HarvestConfig, model_rows: int) -> list[str]:
        """Return a line each on disk, time and memory; `model_rows` are those that the model evaluates.

        Raises:
            DiskSpaceError: the store and the SAEs do not fit on the disk.
        """
        n_rows = harvest.n_contexts * harvest.context_size
        stored = int(n_rows * self.row_bytes)
        needed = Estimate(n_rows, stored, stored + self.sae_bytes, n_rows / self.harvest_speed)
        free = check_disk(user_path(harvest.store), needed)
        n_trained = n_rows * (1 - harvest.holdout_fraction)
        model_rows = min(model_rows, n_rows - n_trained)
        evaluation = (2 + self.n_saes) * model_rows / self.harvest_speed
        total = needed.seconds + n_trained / self.train_speed + evaluation
        return [
            f"measured in {self.trial_seconds:.0f} s on {self.device}, for {n_rows:,} tokens:",
            f"disk    about {human_bytes(needed.stored_bytes)}: {human_bytes(stored)} for the store, "
            f"{human_bytes(self.sae_bytes)} for {self.n_saes} SAEs and their checkpoints; {human_bytes(free)} are free",
            f"time    about {human_seconds(total)}: {human_seconds(needed.seconds)} to harvest at "
            f"{self.harvest_speed:,.0f} tokens/s, {human_seconds(n_trained / self.train_speed)} to train at "
            f"{self.train_speed:,.0f} tokens/s, and at least {human_seconds(evaluation)} to evaluate",
            f"memory  about {human_bytes(self.harvest_memory)} in the harvest, and in training "
            f"{human_bytes(self.train_memory)} beside PyTorch itself",
        ]


def measure_run(
    config: HarvestConfig, training: Callable[[Mapping[str, int]], TrainConfig]
) -> tuple[TrainConfig, RunEstimate]:
    """Try a harvest and a training run in a temporary folder; return the settings of training and what both take.

    `training` gives these settings for the widths of the hook points. The memory of the harvest is the largest that the
    process, or the GPU, has used; that of training is computed as for `thresher train --dry_run true`.

    Raises:
        ThresherError: the harvest or the training run cannot start with these settings.
    """
    began = time.monotonic()
    device = choose_device(config.device)
    with tempfile.TemporaryDirectory(prefix="thresher-init-") as folder, _silent():
        store, speed, row_bytes, widths = _trial_harvest(config, device, Path(folder) / "store")
        harvest_memory = _peak_memory(device)
        train_config = training(widths)
        memory, train_speed, sae_bytes, n_saes = _trial_training(config, train_config, store, device, Path(folder))
    return train_config, RunEstimate(
        device,
        row_bytes,
        sae_bytes,
        n_saes,
        speed,
        train_speed,
        harvest_memory,
        memory,
        time.monotonic() - began,
    )


def _trial_harvest(config: HarvestConfig, device: str, path: Path) -> tuple[Path, float, float, dict[str, int]]:
    """Harvest a few batches; return the store, rows per second, stored bytes per row, and the hook points' widths."""
    plan = make_plan(config)
    batch_rows = config.batch_size * config.context_size
    bytes_per_row = 4 * sum(plan.widths.values())
    n_batches = BATCHES_PER_WORKER * choose_workers(config.workers, torch.device(device))
    n_batches = max(1, min(n_batches, _MOST_BYTES // (bytes_per_row * batch_rows)))
    tokens = min(config.tokens, n_batches * batch_rows)
    # So little text may well have no document to hold out, which a harvest refuses.
    trial = msgspec.structs.replace(config, tokens=tokens, store=str(path), holdout_fraction=0.0)
    contexts = read_contexts(trial, plan.tokenizer, plan.group, plan.rules, plan.n_embeddings)
    with (
        make_writer(trial, plan.widths, {}, ActivationStoreWriter, roles=plan.rules.keeps_roles) as writer,
        HarvestProgress(writer, trial.context_size, trial.n_contexts, 0, disable=True) as progress,
    ):
        started = time.monotonic()
        run_model(trial, plan, writer, contexts, progress, lambda: None)
        seconds = time.monotonic() - started
    n_rows = writer.n_contexts * trial.context_size
    return path, n_rows / seconds, writer.bytes_written / n_rows + TOKEN_BYTES, dict(plan.widths)


def _trial_training(
    harvest: HarvestConfig, config: TrainConfig, path: Path, device: str, folder: Path
) -> tuple[int, float, int, int]:
    """Train for some steps; return the memory of the run, rows per second, bytes on disk and the number of SAEs."""
    store = ActivationStore.open(str(path))
    n_steps = _STEPS[torch.device(device).type]
    trial = msgspec.structs.replace(
        config, store=str(path), output=str(folder / "saes"), tokens=n_steps * config.batch_size
    )
    plan = plan_run(trial, store, int(store.training_rows_per_chunk().sum()))
    n_rows = harvest.n_contexts * harvest.context_size
    hook_points = {place for sae in plan.saes for place in sae.wiring.hook_points}
    windows = sum(min(config.window_bytes, n_rows * store.d_in(name) * store.dtype.itemsize) for name in hook_points)
    memory = sum((dict(plan.memory) | {"windows": windows}).values())
    folders = train(trial)
    lines = (folders[0] / "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["tokens_per_second"] for line in lines]
    weights = sum((one / "sae_weights.safetensors").stat().st_size for one in folders)
    kept = sum(file.stat().st_size for file in (folder / "saes").rglob("*") if file.is_file())
    more = (kept - weights) * (config.keep_checkpoints - 1) if n_rows > config.checkpoint_every_tokens else 0
    return memory, statistics.median(speeds[len(speeds) // 2 :]), kept + more, len(folders)


def _peak_memory(device: str) -> int:
    """Return the most bytes that this process has used so far; on a GPU, those of the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the messages of the trial, but not its warnings."""
    with shown_logs(msgspec.structs.replace(log_settings() or LogSettings(), quiet=True)):
        yield
