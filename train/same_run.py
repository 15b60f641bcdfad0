"""Compare a run on disk with a request: is it the same run, a longer one, or another try of SAEs that diverged?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shared.core.errors import ConfigError
from ..shared.store.format.identity import StoreIdentity
from .architectures import architectures_using
from .checkpoints.record import RunRecord
from .recipes import LARGEST_BATCH, PUBLISHED_WARMUP_STEPS

if TYPE_CHECKING:
    from ..shared.store import ActivationStore
    from .plan import TrainPlan

_MAY_CHANGE = {
    "checkpoint_every_tokens",
    "keep_checkpoints",
    "save_every_tokens",
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
"""Keys that may differ when a run resumes: they do not change the result, or their effect is compared instead."""

_OLD_AUX_COEFFICIENT = 1 / 32
"""The default that releases without a recorded configuration wrote to `config.toml`.

They also accepted options that an architecture does not use, without effect.
"""


@dataclass(frozen=True)
class Request:
    """A request: the configuration as a table, and everything else that determines the result."""

    config: dict[str, Any]
    n_steps: int
    rows_per_epoch: int
    store: StoreIdentity
    recipes: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, table: dict[str, Any], plan: TrainPlan, store: ActivationStore) -> Request:
        """Return the request that a configuration's table, its plan and a store make."""
        return cls(
            table,
            plan.schedule.n_steps,
            plan.rows_per_epoch,
            StoreIdentity.of(store.manifest),
            json.loads(json.dumps(plan.recipes)),
        )

    @property
    def saes(self) -> dict[str, dict[str, Any]]:
        """Return the SAEs' tables by name."""
        return {sae["name"]: sae for sae in self.config["sae"]}


@dataclass(frozen=True)
class Difference:
    """How a request differs from the run on disk; with the defaults it does not.

    `retried` names diverged SAEs whose tables changed, and SAEs that replace diverged ones; `continued` says that a
    finished run continues to more steps.
    """

    retried: tuple[str, ...] = ()
    continued: bool = False


def compare_run(
    output: Path, record: RunRecord, saved: Mapping[str, Any], request: Request, store: object
) -> Difference:
    """Return how a request differs from the run in a folder.

    Raises:
        ConfigError: the request is for another run.
    """
    _check_store(output, record, request, store)
    _check_release(output, record, request)
    now, before = request.saes, {sae["name"]: sae for sae in saved.get("sae", [])}
    if record.row_scales is None:  # a release that shortened no rows, which is resumed
        saved = {**saved, "max_row_norm": request.config.get("max_row_norm")}
    if record.batch_size is None and "batch_size" not in request.config and saved.get("batch_size") == LARGEST_BATCH:
        saved = {key: value for key, value in saved.items() if key != "batch_size"}  # the default of earlier releases
    if record.settings is None:  # a release without recipes, whose settings are resumed
        saved = {**saved, "recipe": request.config.get("recipe")}
        if "warmup_steps" not in request.config and saved.get("warmup_steps") == PUBLISHED_WARMUP_STEPS:
            saved.pop("warmup_steps")
    keys = sorted((saved.keys() | request.config.keys()) - _MAY_CHANGE - {"sae"})
    differing = [key for key in keys if saved.get(key) != request.config.get(key)]
    retried: tuple[str, ...] = ()
    by_name = {name: _differing_keys(name, before, now, record) for name in dict.fromkeys([*before, *now])}
    changed = [name for name, keys in by_name.items() if keys]
    if record.finished and changed and record.n_steps == request.n_steps:
        gone = [name for name in changed if name not in now]
        added = [name for name in changed if name not in before]
        of_diverged = all(name in record.diverged for name in changed if name not in added)
        if of_diverged and len(added) <= len(gone):
            retried, by_name = tuple(name for name in changed if name in now), {}
    differing += [key for keys in by_name.values() for key in keys]
    if not differing and not changed and list(before) != list(now):
        differing.append("sae (in another order)")
    if record.rows_per_epoch != request.rows_per_epoch:
        differing.append("rows_per_epoch")
    continued = record.finished and record.n_steps < request.n_steps and not differing
    if record.n_steps != request.n_steps and not continued:
        differing.append(f"n_steps ({request.n_steps:,}, the run has {record.n_steps:,})")
    if differing:
        raise ConfigError(
            f"'{output}' holds a run of another configuration; differing: {', '.join(differing)}; "
            "restore them, or choose another output"
        )
    return Difference(retried, continued)


def _differing_keys(
    name: str, before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], record: RunRecord
) -> list[str]:
    if name not in before or name not in now:
        return [f"sae '{name}' (only one has it)"]
    saved, current = dict(before[name]), now[name]
    if record.config is None:
        saved = {key: value for key, value in saved.items() if saved.get("architecture") in architectures_using(key)}
        if saved.get("aux_coefficient") == _OLD_AUX_COEFFICIENT and "aux_coefficient" not in current:
            del saved["aux_coefficient"]
    return [
        f"sae '{name}'.{key}" for key in sorted(saved.keys() | current.keys()) if saved.get(key) != current.get(key)
    ]


def _check_store(output: Path, record: RunRecord, request: Request, store: Any) -> None:
    known = record.store
    if known is None or known == request.store:
        return
    where = f"'{store.path}' holds {request.store.contexts:,} contexts"
    began = f"the run in '{output}' began on {known.contexts:,}"
    if known == StoreIdentity.of(store.manifest, known.shards):
        raise ConfigError(
            f"the store {where}, but {began}: it was extended since, which changes the order of all rows; "
            "train on the longer store in another output, with init_from to start from these SAEs"
        )
    raise ConfigError(
        f"the store {where} (content {request.store.digest[:8]}), but {began} of other content "
        f"({known.digest[:8]}); give the store of that run, or choose another output"
    )


def _check_release(output: Path, record: RunRecord, request: Request) -> None:
    """Refuse a run that this release would continue differently from the release that began it."""
    changed = []
    for name, recipe in record.recipes.items():
        if name in record.diverged or name not in request.recipes:
            continue
        here = request.recipes[name]
        keys = [key for key in recipe if key in here and recipe[key] != here[key]]
        if record.config is not None and name in request.saes:
            saved = {sae["name"]: sae for sae in record.config["sae"]}.get(name)
            changed += [f"sae '{name}'.{key}" for key in keys if saved == request.saes[name]]
    if changed:
        raise ConfigError(
            f"the run in '{output}' was begun by a release that trains differently; differing: {', '.join(changed)}; "
            "resume it with that release, or choose another output"
        )
