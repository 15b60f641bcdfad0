"""The training stage: a store's shuffled activations, to every SAE of a sweep."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm

from ..shared.device import choose_device
from ..shared.interrupt import Interrupt
from ..shared.store import ActivationStore
from .batches import ShuffledBatches
from .config import TrainConfig
from .metrics import MetricsLog
from .plan import Plan, plan_run
from .run_state import RunState
from .sae_trainer import SaeTrainer, read_metrics
from .trainers import make_trainers, prepare


def train(config: TrainConfig) -> list[Path]:
    """Train every SAE of a configuration from one stream and return the folders of those that finished.

    An unfinished run of the same configuration goes on from its last checkpoint.

    Raises:
        ThresherError: the store, the configuration or an earlier run in `output` does not allow it.
        KeyboardInterrupt: a signal asked to stop; a checkpoint was written.
    """
    config = msgspec.structs.replace(config, device=choose_device(config.device))
    if torch.device(config.device).type == "cuda":
        torch.cuda.set_device(config.device)
    store = ActivationStore.open(config.store)
    with ShuffledBatches(
        store,
        None,
        config.batch_size,
        config.seed,
        config.device,
        window_bytes=config.window_bytes,
    ) as probe:
        plan = plan_run(config, store, probe.rows_per_epoch)
    if config.dry_run:
        print(plan.describe())
        return []
    run = RunState(config, plan, store)
    if run.finished:
        print(f"this run is finished; its SAEs are in '{config.output}'; choose another output to train again")
        return run.folders()
    hook_points = sorted({place for sae in plan.saes for place in sae.places})
    with ShuffledBatches(
        store, hook_points, config.batch_size, config.seed, config.device, window_bytes=config.window_bytes
    ) as batches:
        trainers = make_trainers(config, plan, store)
        run.resume(trainers, batches)
        _train_to_end(config, plan, run, trainers, batches)
    folders = run.finish(trainers)
    n_tokens = plan.schedule.n_steps * plan.schedule.batch_size
    print(f"trained {len(folders)} SAEs on {n_tokens:,} tokens; they are in '{config.output}'", file=sys.stderr)
    return folders


def _train_to_end(
    config: TrainConfig, plan: Plan, run: RunState, trainers: list[SaeTrainer], batches: ShuffledBatches
) -> None:
    n_steps, batch_size = plan.schedule.n_steps, plan.schedule.batch_size
    checkpoint_steps = max(1, config.checkpoint_every_tokens // batch_size)
    logs = {t.name: MetricsLog(run.output / t.name, run.step, config.tensorboard) for t in trainers}
    bar = tqdm(
        total=n_steps * batch_size,
        initial=run.step * batch_size,
        unit="token",
        unit_scale=True,
        desc="train",
        disable=not sys.stderr.isatty(),
    )
    started, waited, last_step = time.perf_counter(), 0.0, run.step
    try:
        with Interrupt() as interrupt, bar:
            while run.step < n_steps:
                asked = time.perf_counter()
                prepared = prepare(next(batches), trainers)
                waited += time.perf_counter() - asked
                metrics = {
                    t.name: t.step(prepared[t.config.inputs, t.config.hook_point_out])
                    for t in trainers
                    if not t.diverged
                }
                run.step += 1
                bar.update(batch_size)
                log_now = run.step % config.log_every_steps == 0 or run.step == n_steps
                save_now = interrupt.requested or (run.step % checkpoint_steps == 0 and run.step < n_steps)
                if log_now:
                    read = {name: read_metrics(values) for name, values in metrics.items()}
                    elapsed = time.perf_counter() - started
                    n_tokens = (run.step - last_step) * batch_size
                    speed = {"tokens_per_second": n_tokens / elapsed, "data_wait_fraction": waited / elapsed}
                    for name, values in read.items():
                        logs[name].write(run.step, run.step * batch_size, values | speed)
                    bar.set_postfix_str(_losses(read), refresh=False)
                    started, waited, last_step = time.perf_counter(), 0.0, run.step
                if log_now or save_now:
                    for trainer in trainers:
                        trainer.check()
                run.record_divergence(trainers)
                if save_now:
                    for log in logs.values():
                        log.flush()
                    saving = time.perf_counter()
                    run.checkpoint(trainers, batches)
                    started += time.perf_counter() - saving
                interrupt.check()
    finally:
        for log in logs.values():
            log.close()


def _losses(metrics: dict[str, dict[str, Any]]) -> str:
    fvu = [1 - values["explained_variance"] for values in metrics.values() if "explained_variance" in values]
    return "fvu " + " ".join(f"{value:.3f}" for value in fvu[:12])
