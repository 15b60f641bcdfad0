"""What a training run will do, worked out and checked before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..shared.core.compute.device import choose_device, describe_device
from ..shared.core.errors import ConfigError, HookPointError, StoreError
from .architectures import make_architecture
from .architectures.registry import find_architecture
from .check_settings import check_activations, check_schedules, notes_of
from .config import SaeConfig, TrainConfig
from .kernels import backend_for
from .memory import available_memory, held_bytes, parameter_shapes
from .parallel.latents import check_can_be_sharded
from .parallel.layout import most_held
from .parallel.ranks import TrainRanks
from .step.sae_trainer import Schedule
from .sweep.grids import expand_sweep
from .warm_start import read_initial, source_of

if TYPE_CHECKING:
    from ..shared.store import ActivationStore


@dataclass(frozen=True)
class Plan:
    """A checked run: the SAEs, their schedule, and what they take."""

    saes: tuple[SaeConfig, ...]
    schedule: Schedule
    rows_per_epoch: int
    n_parameters: dict[str, int]
    memory_bytes: int
    device: str = "cpu"
    kernels: str = "auto"
    parallel: str = "spread"
    n_ranks: int = 1
    notes: tuple[str, ...] = ()
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the plan as a table and a summary."""
        own = dict.fromkeys(key for sae in self.saes for key in find_architecture(sae.architecture).required)
        columns = ("name", "architecture", "hook_point", "d_sae", *own, "lr", "parameters")
        rows = [
            [_shown(sae, key) for key in columns[:-1]] + [f"{self.n_parameters[str(sae.name)]:,}"] for sae in self.saes
        ]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (columns, *rows)
        ]
        n_tokens = self.schedule.n_steps * self.schedule.batch_size
        lines.append(
            f"{len(self.saes)} SAEs, {sum(self.n_parameters.values()):,} parameters, "
            f"{self.schedule.n_steps:,} steps of {self.schedule.batch_size:,} = {n_tokens:,} tokens "
            f"({n_tokens / self.rows_per_epoch:.2f} epochs of {self.rows_per_epoch:,}), "
            f"about {self.memory_bytes / 2**30:.2f} GiB of memory; "
            f"on {describe_device(self.device)} with {self.kernels} kernels"
            + (f", parallel = '{self.parallel}' over {self.n_ranks} processes" if self.n_ranks > 1 else "")
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def plan_run(config: TrainConfig, store: ActivationStore, rows_per_epoch: int, ranks: TrainRanks | None = None) -> Plan:
    """Expand the sweep and check it against the store and the machine; memory is that of the rank that needs most.

    Raises:
        ConfigError: a hyperparameter does not fit, or the machine has too little memory.
        HookPointError: the store lacks a hook point.
        StoreError: the store has no training rows, or those of a hook point do not vary.
    """
    if not rows_per_epoch:
        raise StoreError(f"store '{store.path}' has no training rows; all are held out or masked")
    ranks = ranks or TrainRanks(config.device)
    saes = expand_sweep(config.sae)
    tokens = config.tokens if config.tokens is not None else max(1, round(config.epochs * rows_per_epoch))
    n_steps = -(-tokens // config.batch_size)
    schedule = Schedule(n_steps, config.batch_size, config.warmup_steps, config.decay_fraction, config.lr_decay)
    n_parameters, needed, architectures = {}, {}, {}
    for sae in saes:
        for place in sae.wiring.hook_points:
            if place not in store.hook_points:
                raise HookPointError(
                    f"SAE '{sae.name}': no hook point '{place}' in store '{store.path}'; "
                    f"it has: {', '.join(store.hook_points)}"
                )
        d_in, d_out = (_width(store, sae, names) for names in (sae.wiring.reads, sae.wiring.writes))
        try:
            architecture = make_architecture(sae, d_in, d_out)
            check_schedules(architecture, schedule)
        except ConfigError as error:
            raise ConfigError(f"SAE '{sae.name}': {error}") from None
        architectures[str(sae.name)] = architecture
        if config.dry_run and source_of(sae, config.init_from) is not None:
            read_initial(sae, config.init_from, architecture)
        if config.parallel == "latents" and ranks.n > 1:
            check_can_be_sharded(sae, architecture)
        parameters = parameter_shapes(architecture).values()
        n_parameters[str(sae.name)] = sum(tensor.numel() for tensor in parameters)
        gradients = sum(tensor.nbytes for tensor in parameters)
        needed[str(sae.name)] = held_bytes(architecture, config.compute_dtype) + gradients
    check_activations(store, saes)
    largest = max(architecture.d_sae for architecture in architectures.values())
    hook_points = {place for sae in saes for place in sae.wiring.hook_points}
    window_bytes = sum(
        min(config.window_bytes, store.n_rows * store.d_in(hook) * store.dtype.itemsize) for hook in hook_points
    )
    trained = most_held(config.parallel, list(n_parameters.values()), list(needed.values()), ranks.n)
    memory = window_bytes + trained + 2 * config.batch_size * largest
    device = choose_device(config.device)
    available = available_memory(device) // (1 if torch.device(device).type == "cuda" else ranks.local_n)
    if memory > available:
        raise ConfigError(
            f"the run needs about {memory / 2**30:.1f} GiB of memory and {available / 2**30:.1f} are available; "
            "train fewer SAEs at once, narrower ones, or with a smaller window_bytes"
        )
    return Plan(
        tuple(saes),
        schedule,
        rows_per_epoch,
        n_parameters,
        memory,
        device,
        backend_for(device, config.kernels),
        config.parallel,
        ranks.n,
        notes_of(list(architectures.values()), schedule, rows_per_epoch),
        {name: architecture.recipe for name, architecture in architectures.items()},
    )


def _width(store: ActivationStore, sae: SaeConfig, names: tuple[str, ...]) -> int:
    """Return the width of rows side by side.

    Raises:
        ConfigError: their hook points differ in width.
    """
    widths = {name: store.d_in(name) for name in names}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"'{name}' {width}" for name, width in widths.items())
        raise ConfigError(
            f"SAE '{sae.name}': hook points that are read or written together differ in width ({found}); "
            "expected one width"
        )
    return sum(widths.values())


def _shown(sae: SaeConfig, key: str) -> str:
    value, n_more = getattr(sae, key, None), len(sae.wiring.reads) - 1
    if key == "hook_point" and n_more:
        return f"{value} and {n_more} more"
    if key == "d_sae" and sae.cross_layer:
        return f"{n_more + 1} x {value}"
    return "-" if value is None else str(value)
