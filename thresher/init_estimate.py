"""What a run takes, measured by a trial: a harvest of a few batches, some steps of training, parts of an evaluation."""

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

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.saes.sae_folders import load_saes, sae_folders
from thresher.evaluate.speed import EvaluationSpeed, measure_evaluation, model_tokens
from thresher.harvest.config import HarvestConfig
from thresher.harvest.estimate import TOKEN_BYTES, Estimate, check_disk, human_bytes, human_seconds
from thresher.harvest.model.forward import choose_workers
from thresher.harvest.model.plan import HarvestPlan, make_plan
from thresher.harvest.progress import HarvestProgress
from thresher.harvest.steps import make_writer, run_model
from thresher.harvest.tokens.tokens import read_contexts
from thresher.shared.core.compute.device import choose_device
from thresher.shared.core.paths import user_path
from thresher.shared.core.terminal.logs import LogSettings, log_settings, shown_logs
from thresher.shared.store import ActivationStore, ActivationStoreWriter
from thresher.train.config import TrainConfig
from thresher.train.plan import plan_run
from thresher.train.recipes import batch_size_for
from thresher.train.run import train

BATCHES_PER_WORKER = 2
_MOST_BYTES = 512 << 20
_STEPS = {"cpu": 12, "cuda": 192}
"""Steps of the trial; on a GPU their speed is known every 64 steps."""


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes, in bytes, rows per second and seconds; `lines` says it in words.

    `start_seconds` is what each command takes to start, and `load_seconds` what loading the model takes.
    """

    device: str
    row_bytes: float
    sae_bytes: int
    n_saes: int
    start_seconds: float
    load_seconds: float
    harvest_speed: float
    train_speed: float
    evaluation: EvaluationSpeed
    harvest_memory: int
    train_memory: int
    trial_seconds: float

    def lines(self, harvest: HarvestConfig, evaluate: EvaluateConfig) -> list[str]:
        """Return a line each on disk, time and memory.

        Raises:
            DiskSpaceError: the store and the SAEs do not fit on the disk.
        """
        n_rows = harvest.n_contexts * harvest.context_size
        stored = int(n_rows * self.row_bytes)
        needed = Estimate(n_rows, stored, stored + self.sae_bytes, n_rows / self.harvest_speed)
        free = check_disk(user_path(harvest.store), needed)
        n_held_out = round(n_rows * harvest.holdout_fraction)
        harvesting, training, evaluating = self.seconds(harvest, evaluate)
        in_model = model_tokens(evaluate, n_held_out)
        spliced = f", with {in_model:,} tokens in the model at {1 / self.evaluation.model:,.0f} tokens/s" * (
            in_model > 0
        )
        return [
            f"measured in {self.trial_seconds:.0f} s on {self.device}, for {n_rows:,} tokens:",
            f"disk    about {human_bytes(needed.stored_bytes)}: {human_bytes(stored)} for the store, "
            f"{human_bytes(self.sae_bytes)} for {self.n_saes} SAEs and their checkpoints; {human_bytes(free)} are free",
            f"time    about {human_seconds(harvesting + training + evaluating)}: "
            f"{human_seconds(harvesting)} to harvest at {self.harvest_speed:,.0f} tokens/s, "
            f"{human_seconds(training)} to train at {self.train_speed:,.0f} tokens/s, "
            f"{human_seconds(evaluating)} to evaluate{spliced}",
            f"memory  about {human_bytes(self.harvest_memory)} in the harvest, and in training "
            f"{human_bytes(self.train_memory)} beside PyTorch itself",
        ]

    def seconds(self, harvest: HarvestConfig, evaluate: EvaluateConfig) -> tuple[float, float, float]:
        """Return the seconds of the harvest, of training and of the evaluation."""
        n_rows = harvest.n_contexts * harvest.context_size
        n_held_out = round(n_rows * harvest.holdout_fraction)
        loading = self.load_seconds if evaluate.model is not False else 0.0
        return (
            self.start_seconds + self.load_seconds + n_rows / self.harvest_speed,
            self.start_seconds + (n_rows - n_held_out) / self.train_speed,
            self.start_seconds + loading + self.evaluation.seconds(evaluate, n_rows, n_held_out),
        )


def measure_run(
    config: HarvestConfig,
    training: Callable[[Mapping[str, int]], TrainConfig],
    evaluation: EvaluateConfig,
    start_seconds: float = 0.0,
) -> tuple[TrainConfig, RunEstimate]:
    """Try a harvest, a training run and parts of an evaluation in a temporary folder.

    Return the settings of training and what the stages take. `training` gives these settings for the widths of the
    hook points. The memory of the harvest is the largest that the process, or the GPU, has used; that of training is
    computed as for `thresher train --dry_run true`.

    Raises:
        ThresherError: the harvest or the training run cannot start with these settings.
    """
    began = time.monotonic()
    device = choose_device(config.device)
    with tempfile.TemporaryDirectory(prefix="thresher-init-") as name, _silent():
        folder = Path(name)
        plan = make_plan(config)
        load_seconds = time.monotonic() - began
        path, speed, row_bytes = _trial_harvest(config, plan, device, folder / "store")
        harvest_memory = _peak_memory(device)
        train_config = training(plan.widths)
        memory, train_speed, sae_bytes, n_saes = _trial_training(config, train_config, path, device, folder)
        store = ActivationStore.open(str(path))
        saes = load_saes(sae_folders(str(folder / "saes")), store, device, {})
        evaluated = measure_evaluation(evaluation, store, saes, plan.model, plan.tokenizer, folder)
    return train_config, RunEstimate(
        device,
        row_bytes,
        sae_bytes,
        n_saes,
        start_seconds,
        load_seconds,
        speed,
        train_speed,
        evaluated,
        harvest_memory,
        memory,
        time.monotonic() - began,
    )


def _trial_harvest(config: HarvestConfig, plan: HarvestPlan, device: str, path: Path) -> tuple[Path, float, float]:
    """Harvest a few batches; return the store, rows per second, and stored bytes per row."""
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
    return path, n_rows / seconds, writer.bytes_written / n_rows + TOKEN_BYTES


def _trial_training(
    harvest: HarvestConfig, config: TrainConfig, path: Path, device: str, folder: Path
) -> tuple[int, float, int, int]:
    """Train for some steps; return the memory of the run, rows per second, bytes on disk and the number of SAEs."""
    store = ActivationStore.open(str(path))
    n_steps = _STEPS[torch.device(device).type]
    n_rows = harvest.n_contexts * harvest.context_size
    batch_size = config.batch_size or batch_size_for(n_rows, n_rows, config.recipe).value
    trial = msgspec.structs.replace(
        config, store=str(path), output=str(folder / "saes"), batch_size=batch_size, tokens=n_steps * batch_size
    )
    plan = plan_run(trial, store, int(store.training_rows_per_chunk().sum()))
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
