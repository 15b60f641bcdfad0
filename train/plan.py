"""What a training run will do, worked out and checked before it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from ..shared.core.compute.device import choose_device, describe_device
from ..shared.core.errors import ConfigError, HookPointError, StoreError
from .architectures import make_architecture
from .architectures.base import Architecture
from .architectures.registry import find_architecture
from .check_settings import check_activations, check_frozen, check_rotated, check_schedules, notes_of
from .config import SaeConfig, TrainConfig
from .kernels import backend_for
from .memory import Memory, available_memory, fused_step_bytes, parameter_shapes, sae_memory
from .parallel.latents import check_can_be_sharded
from .parallel.layout import trained_on
from .parallel.ranks import TrainRanks
from .recipes import (
    ROTATED_KINDS,
    Began,
    RunFacts,
    Setting,
    batch_size_for,
    completed,
    rotation_for,
    settings_for,
    warmup_for,
)
from .step.sae_trainer import Schedule
from .stream.batches import no_training_rows
from .sweep.grids import expand_sweep
from .warm_start import read_initial, source_of

if TYPE_CHECKING:
    from ..shared.store import ActivationStore


_OF_RUN = ("batch_size", "warmup_steps", "rotation")
"""Settings of a whole run that its configuration may leave open."""


@dataclass(frozen=True)
class TrainPlan:
    """A checked run: the SAEs, their schedule, and what they take. `rotates` names those whose rows are rotated."""

    saes: tuple[SaeConfig, ...]
    schedule: Schedule
    rows_per_epoch: int
    n_parameters: dict[str, int]
    memory: Mapping[str, int]
    device: str = "cpu"
    kernels: str = "auto"
    parallel: str = "spread"
    n_ranks: int = 1
    notes: tuple[str, ...] = ()
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    rotates: frozenset[str] = frozenset()
    of_run: dict[str, Setting] = field(default_factory=dict)
    settings: dict[str, dict[str, Setting]] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)

    def completed(self, sae: SaeConfig) -> SaeConfig:
        """Return an SAE's table with the settings that were chosen where it leaves them open."""
        return completed(sae, {key: setting.value for key, setting in self.settings.get(str(sae.name), {}).items()})

    def of_run_for(self, name: str) -> dict[str, Any]:
        """Return the settings of the whole run with which an SAE is trained, chosen or given."""
        rotation = "pca" if name in self.rotates else "none"
        return dict(zip(_OF_RUN, (self.schedule.batch_size, self.schedule.warmup_steps, rotation), strict=True))

    @property
    def memory_bytes(self) -> int:
        """The bytes that the process which needs most needs."""
        return sum(self.memory.values())

    def describe(self) -> str:
        """Return the plan as a table and a summary."""
        own = dict.fromkeys(key for sae in self.saes for key in _telling_keys(sae))
        columns = ("name", "architecture", "hook_point", "d_sae", *own, "lr", "parameters")
        rows = [
            [_shown(self.completed(sae), key) for key in columns[:-1]] + [f"{self.n_parameters[str(sae.name)]:,}"]
            for sae in self.saes
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
        parts = ", ".join(f"{name} {n_bytes / 2**30:.2f}" for name, n_bytes in self.memory.items() if n_bytes)
        process = "the process that needs most" if self.n_ranks > 1 else "the process"
        lines.append(f"memory of {process}, in GiB: {parts}")
        lines += self._chosen()
        for how in dict.fromkeys(self.steps.values()):
            names = [f"'{name}'" for name, own in self.steps.items() if own == how]
            of = "" if len(names) == len(self.steps) else f" of {', '.join(names)}"
            lines.append(f"steps{of}: {how}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _chosen(self) -> list[str]:
        """Return a line for each setting that was chosen, with the names of the SAEs and the reason."""
        lines = [f"chosen: {key} = {setting.value} ({setting.reason})" for key, setting in self.of_run.items()]
        saes: dict[tuple[str, Setting], list[str]] = {}
        for name, settings in self.settings.items():
            for key, setting in settings.items():
                saes.setdefault((key, setting), []).append(f"'{name}'")
        every = len(self.settings)
        for (key, setting), names in saes.items():
            of = "" if len(names) == every else f" of {', '.join(names)}"
            lines.append(f"chosen: {key} = {setting.value:g}{of} ({setting.reason})")
        return lines


def plan_run(
    config: TrainConfig,
    store: ActivationStore,
    rows_per_epoch: int,
    ranks: TrainRanks | None = None,
    began: Began | None = None,
) -> TrainPlan:
    """Expand the sweep and check it against the store and the machine; memory is that of the rank that needs most.

    `began` are the settings with which a run in the output began; it keeps them.

    Raises:
        ConfigError: a hyperparameter does not fit, or the machine has too little memory.
        HookPointError: the store lacks a hook point.
        StoreError: the store has no training rows, or those of a hook point do not vary.
    """
    if not rows_per_epoch:
        raise StoreError(no_training_rows(store, config.documents))
    ranks = ranks or TrainRanks(config.device)
    saes = expand_sweep(config.sae)
    tokens = config.tokens if config.tokens is not None else max(1, round(config.epochs * rows_per_epoch))
    of_run = _of_run(config, tokens, rows_per_epoch, began)
    batch_size, warmup_steps, rotation = (
        of_run[key].value if key in of_run else getattr(config, key) for key in _OF_RUN
    )
    kinds = ROTATED_KINDS if began is None else began.rotated_kinds
    n_steps = -(-tokens // batch_size)
    schedule = Schedule(n_steps, batch_size, warmup_steps, config.decay_fraction, config.lr_decay)
    settings: dict[str, dict[str, Setting]] = {}
    n_parameters, architectures, rotates = {}, {}, set()
    for sae in saes:
        for place in sae.wiring.hook_points:
            if place not in store.hook_points:
                raise HookPointError(
                    f"SAE '{sae.name}': no hook point '{place}' in store '{store.path}'; "
                    f"it has: {', '.join(store.hook_points)}"
                )
        d_in, d_out = (_width(store, sae, names) for names in (sae.wiring.reads, sae.wiring.writes))
        try:
            facts = RunFacts(n_steps, batch_size, d_in, source_of(sae, config.init_from) is not None)
            known = began.settings_for(sae) if began is not None else None
            chosen = settings_for(sae, facts, config.recipe) if known is None else known
            settings[str(sae.name)] = chosen
            complete = completed(sae, {key: setting.value for key, setting in chosen.items()})
            architecture = make_architecture(complete, d_in, d_out)
            check_schedules(architecture, schedule)
            shapes = parameter_shapes(architecture)
            check_frozen(architecture, shapes)
            wiring = sae.wiring
            by_default = wiring.kind in kinds and wiring.reads == wiring.writes
            if rotation == "pca" and (config.rotation is not None or by_default):
                check_rotated(architecture, shapes)
                rotates.add(str(sae.name))
        except ConfigError as error:
            raise ConfigError(f"SAE '{sae.name}': {error}") from None
        architectures[str(sae.name)] = architecture
        if config.dry_run and source_of(sae, config.init_from) is not None:
            read_initial(sae, config.init_from, architecture)
        if config.parallel == "latents" and ranks.n > 1:
            check_can_be_sharded(sae, architecture)
        n_parameters[str(sae.name)] = sum(tensor.numel() for tensor in shapes.values())
    check_activations(store, saes)
    device = choose_device(config.device)
    memory = _memory(config, batch_size, store, architectures, n_parameters, device, ranks.n, rotates)
    needed = sum(memory.values())
    available = available_memory(device) // (1 if torch.device(device).type == "cuda" else ranks.local_n)
    if needed > available:
        raise ConfigError(
            f"the run needs about {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} are available; "
            "train fewer SAEs at once, narrower ones, or with a smaller window_bytes"
        )
    return TrainPlan(
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
        frozenset(rotates),
        of_run,
        settings,
        {name: _how_steps_run(config, architecture, device, ranks.n) for name, architecture in architectures.items()},
    )


def _of_run(config: TrainConfig, tokens: int, rows_per_epoch: int, began: Began | None) -> dict[str, Setting]:
    """Return the settings of the whole run that its configuration leaves open."""
    if began is None:
        batch_size = batch_size_for(tokens, rows_per_epoch, config.recipe)
        warmup_steps = warmup_for(-(-tokens // (config.batch_size or batch_size.value)), config.recipe)
        settings = (batch_size, warmup_steps, rotation_for(config.recipe))
    else:
        values = (began.batch_size, began.warmup_steps, "pca" if began.rotated_kinds else "none")
        settings = tuple(Setting(value, "as the run began") for value in values)
    return {key: setting for key, setting in zip(_OF_RUN, settings, strict=True) if getattr(config, key) is None}


def _how_steps_run(config: TrainConfig, architecture: Architecture, device: str, n_ranks: int) -> str:
    """Return whether an SAE's steps are fused and captured in CUDA graphs, and why not, if not."""
    backend = backend_for(device, config.kernels)
    if backend != "triton":
        return f"operation by operation (kernels '{backend}' have no fused step)"
    why = architecture.not_fused
    steps = "fused kernels" if why is None else f"operation by operation ({why})"
    if not config.cuda_graphs:
        return f"{steps}; no CUDA graphs (cuda_graphs = false)"
    if torch.device(device).type != "cuda":
        return f"{steps}; no CUDA graphs (device '{device}')"
    if n_ranks > 1 and config.parallel != "spread":
        return f"{steps}; no CUDA graphs (parallel = '{config.parallel}' exchanges tensors within a step)"
    captures = architecture.declares("capturable")
    return f"{steps}; {'in CUDA graphs' if captures else 'no CUDA graphs (a step waits for the device)'}"


def _memory(
    config: TrainConfig,
    batch_size: int,
    store: ActivationStore,
    architectures: Mapping[str, Architecture],
    n_parameters: Mapping[str, int],
    device: str,
    n_ranks: int,
    rotates: Collection[str],
) -> dict[str, int]:
    """Return the bytes, by what they are, of the process that needs most.

    `windows` bounds the decoded activations. `batch` counts the pre-activations of the widest SAE in 2 bytes, and the
    rows of the widest hook points in 16: as stored, normalised in both dtypes, and the error; in 20 where they are
    rotated, for which `rotation` counts the matrices. Ranks whose fused steps
    share a batch also hold its other rows in the compute dtype, their errors, and the entries in 12 bytes. Fused steps
    hold partial sums besides; they have no pre-activations, but AuxK and the selection have room in those counted.
    """
    together = n_ranks > 1 and config.parallel != "spread"
    n_shards = n_ranks if together and config.parallel == "latents" else 1
    has_kernels = backend_for(device, config.kernels) == "triton"
    fused = [architecture for architecture in architectures.values() if has_kernels and architecture.not_fused is None]
    on_cpu = torch.device(device).type == "cpu"
    each = [
        sae_memory(
            architecture,
            config.compute_dtype,
            "fused" if architecture in fused else "cpu" if on_cpu else "ops",
            n_shards,
        )
        for architecture in architectures.values()
    ]
    # On a CPU SAEs step side by side, on a GPU one after another.
    of_ranks = [
        reduce(lambda total, one: total.plus(one, at_once=on_cpu), (each[i] for i in saes), Memory())
        for saes in trained_on(config.parallel, list(n_parameters.values()), n_ranks)
    ]
    rows = batch_size // (n_ranks if config.parallel == "data" else 1)
    widest = max(-(-architecture.d_sae // n_shards) for architecture in architectures.values())
    width = max(max(architecture.d_in, architecture.d_out) for architecture in architectures.values())
    n_bytes = getattr(torch, config.compute_dtype).itemsize
    a_row = max(((n_bytes + 4) * one.d_in + 12 * int(one.config.k or 0) for one in fused), default=0)
    sums = max(
        (fused_step_bytes(batch_size, int(one.config.k or 0), -(-one.d_sae // n_shards), one.d_in) for one in fused),
        default=0,
    )
    hook_points = {place for architecture in architectures.values() for place in architecture.config.wiring.hook_points}
    windows = [store.n_rows * store.d_in(hook) * store.dtype.itemsize for hook in hook_points]
    turned = {place for name in rotates for place in architectures[name].config.wiring.hook_points}
    return {
        **max(of_ranks, key=sum)._asdict(),
        "rotation": sum(4 * store.d_in(hook) ** 2 for hook in turned),
        "windows": sum(min(config.window_bytes, n_bytes) for n_bytes in windows),
        "batch": rows * (2 * widest + (20 if rotates else 16) * width) + (batch_size - rows) * a_row + sums,
    }


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


def _telling_keys(sae: SaeConfig) -> tuple[str, ...]:
    """Return the keys of a table that a plan shows besides those of all SAEs."""
    given = (key for key in ("l1_coefficient", "l0_coefficient", "target_l0") if getattr(sae, key, None) is not None)
    return (*find_architecture(sae.architecture).required, *given)


def _shown(sae: SaeConfig, key: str) -> str:
    value, n_more = getattr(sae, key, None), len(sae.wiring.reads) - 1
    if key == "hook_point" and n_more:
        return f"{value} and {n_more} more"
    if key == "d_sae" and sae.cross_layer:
        return f"{n_more + 1} x {value}"
    return "-" if value is None else str(value)
