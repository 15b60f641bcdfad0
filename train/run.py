"""The training stage: feed a store's shuffled activations to every SAE of a sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..shared.core.compute.device import make_current
from ..shared.core.config import configured
from ..shared.core.disk import check_output
from ..shared.core.interrupt import Interrupt
from ..shared.core.terminal.results import print_result
from ..shared.store import ActivationStore
from .checkpoints.output import locked
from .config import TrainConfig
from .lockstep import make_trainers, prepare_batches, step_all
from .parallel.layout import Layout
from .parallel.ranks import Agreement, TrainRanks, open_ranks
from .plan import TrainPlan, plan_run
from .reporting.metrics import PendingLines
from .reporting.progress import TrainProgress
from .run_state import RunState, began_with
from .step.sae_trainer import SaeTrainer
from .stream.batches import ShuffledBatches
from .stream.normalization import shortening_notes
from .stream.row_mask import TrainingRowMask
from .warm_start import initialise_trainers

_log = logging.getLogger(__name__)


class TrainedSaes(list[Path]):
    """Folders of trained SAEs; `diverged` maps the names of the other SAEs to the reason."""

    def __init__(self, folders: Iterable[Path] = (), diverged: Mapping[str, str] | None = None):
        super().__init__(folders)
        self.diverged = dict(diverged or {})


def train(config: TrainConfig | str | Path | None = None, **settings: Any) -> TrainedSaes:
    """Train every SAE of a configuration from one stream and return the folders of those that finished.

    An unfinished run of the same configuration resumes from its last checkpoint. A finished run continues if the
    configuration has more tokens; SAEs that diverged are trained again, alone, if their tables changed. SAEs that
    diverged are in the result's `diverged`. Under `torchrun` every process calls this function, and `config.parallel`
    says how they train together. The configuration is an object, the path of a TOML file, or none; keywords replace its
    keys.

    Raises:
        ThresherError: the store, the configuration or an earlier run in `output` does not allow it.
        KeyboardInterrupt: a signal asked to stop; a checkpoint was written.
    """
    config = configured(TrainConfig, config, settings)
    with open_ranks(config.device) as ranks:
        return _train(msgspec.structs.replace(config, device=ranks.device), ranks)


def _train(config: TrainConfig, ranks: TrainRanks) -> TrainedSaes:
    make_current(config.device)
    say = _log.info if ranks.first else _say_nothing
    output = Path(config.output)
    store = ActivationStore.open(config.store, cache=config.cache, cache_bytes=config.cache_bytes, roles=config.roles)
    check_output(output, store.path)
    began = ranks.from_first(began_with(output) if ranks.first else None)
    plan = plan_run(config, store, int(TrainingRowMask(store, config.documents).rows_per_chunk().sum()), ranks, began)
    if config.dry_run:
        if ranks.first:
            print_result(plan.describe())
        return TrainedSaes()
    with locked(output, ranks):
        run = RunState(config, plan, store, ranks)
        if run.finished and run.folders():
            say(
                f"this run is finished; its SAEs are in '{output}'; "
                "give more tokens to train on, or another output to train again"
            )
        elif not run.finished:
            _train_to_end(config, run, store, say)
    if run.diverged:
        if not run.folders():
            raise run.no_sae_left()
        if ranks.first:
            _log.warning(_divergence_line(run.diverged, len(run.folders())))
    return TrainedSaes(run.folders(), run.diverged)


def _train_to_end(config: TrainConfig, run: RunState, store: ActivationStore, say: Callable[[str], None]) -> None:
    plan, layout = run.plan, run.layout
    normalizations = run.normalizations(store)
    for note in (*plan.notes, *shortening_notes(store, run.row_scales)):
        say(f"note: {note}")
    with _open_batches(config, plan, store, layout) as batches:
        trainers = make_trainers(config, plan, normalizations, layout)
        run.resume(trainers, batches)
        if run.step == 0:
            for name, note in initialise_trainers(trainers, config.init_from):
                if layout.saves(name):
                    _log.info(f"note: {note}")
        _take_steps(config, plan, run, trainers, batches, layout)
        run.finish(trainers, batches)
    n_tokens = plan.schedule.n_steps * plan.schedule.batch_size
    n_trained = sum(name not in run.diverged for name in plan.n_parameters)
    saes = "1 SAE" if n_trained == 1 else f"{n_trained} SAEs"
    say(f"trained {saes} on {n_tokens:,} tokens, in '{config.output}'")


def _divergence_line(diverged: Mapping[str, str], n_trained: int) -> str:
    reasons = "; ".join(f"'{name}' with {reason}" for name, reason in diverged.items())
    return (
        f"{len(diverged)} of {len(diverged) + n_trained} SAEs diverged and have no weights: {reasons}; "
        "change their tables (a lower lr, another seed) and run again to train only these"
    )


def _open_batches(config: TrainConfig, plan: TrainPlan, store: ActivationStore, layout: Layout) -> ShuffledBatches:
    hook_points = sorted({place for sae in layout.saes_here(plan.saes) for place in sae.wiring.hook_points})
    part, n_parts = layout.batch_slice
    return ShuffledBatches(
        store,
        hook_points,
        plan.schedule.batch_size,
        config.seed,
        config.device,
        window_bytes=config.window_bytes,
        rank=part,
        world_size=n_parts,
        n_rows=plan.schedule.n_steps * plan.schedule.batch_size,
        documents=config.documents,
    )


def _take_steps(
    config: TrainConfig,
    plan: TrainPlan,
    run: RunState,
    trainers: list[SaeTrainer],
    batches: ShuffledBatches,
    layout: Layout,
) -> None:
    n_steps, batch_size = plan.schedule.n_steps, plan.schedule.batch_size
    checkpoint_steps = max(1, config.checkpoint_every_tokens // batch_size)
    save_steps = max(1, config.save_every_tokens // batch_size) if config.save_every_tokens else n_steps
    saved_here = [run.output / trainer.name for trainer in trainers if layout.saves(trainer.name)]
    agreement, pending = Agreement(layout.ranks), PendingLines(run.step)
    with (
        Interrupt() as interrupt,
        TrainProgress(config, plan.schedule, run.step, saved_here, shown=layout.ranks.first) as progress,
    ):
        while run.step < n_steps:
            with progress.waiting():
                prepared = prepare_batches(next(batches), trainers)
            metrics = step_all(trainers, prepared)
            run.step += 1
            progress.advance()
            ends = run.step == n_steps
            checkpoint_now = run.step % checkpoint_steps == 0 and not ends
            save_now = run.step % save_steps == 0 and not ends
            read_now = checkpoint_now or save_now or ends
            if run.step % config.log_every_steps == 0 or ends:
                read_now |= pending.add(run.step, metrics)
            if read_now:
                for trainer in trainers:
                    trainer.check()
                progress.log(pending.read())
            run.record_divergence(trainers)
            decision = agreement.ask(stop=interrupt.requested, trains=not all(t.diverged for t in trainers))
            if decision.all_diverged:
                if not run.has_healthy(trainers):
                    raise run.no_sae_left()
                break
            if save_now:
                with progress.pausing():
                    run.save_saes(trainers)
            if checkpoint_now or decision.stop:
                progress.log(pending.read())
                with progress.pausing():
                    run.checkpoint(trainers, batches)
            if decision.stop:
                agreement.settle()
                raise KeyboardInterrupt
        agreement.settle()


def _say_nothing(message: str) -> None:
    pass
