"""Find the SAEs to evaluate, and check each against the store."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...shared.core.errors import HookPointError, MissingFileError, SaeError
from ...shared.model.hook_points import canonical_hook_point, group_name, members
from ...shared.sae import CrossLayerTranscoder, Sae
from ...shared.sae.formats import find_saes, is_sae, natural_order, walk_saes
from ...shared.sae.formats.files import CONFIG_NAME, DIVERGED_NAME
from ...shared.sae.sources import locate_source
from ...shared.store import ActivationStore
from .hook_group import width
from .names import printable

_log = logging.getLogger(__name__)

SPARSITY_KEYS = ("k", "l1_coefficient", "l0_coefficient", "target_l0")
"""The training settings that control sparsity."""


@dataclass(frozen=True)
class EvaluatedSae:
    """An SAE under evaluation, its name in the results, and the hook points that it reads and reconstructs.

    For a crosscoder, `hook_point` and `target` are both the name of its group of hook points (see `hook_group`). For a
    cross-layer transcoder, they are the names of the groups that it reads and writes. `made_as` is the kind of a
    baseline that the evaluation itself made, without files.
    """

    name: str
    path: Path
    sae: Sae
    hook_point: str
    target: str
    made_as: str | None = None

    @property
    def baseline(self) -> str | None:
        """The kind of baseline that this is: made here, or trained with frozen directions; None for other SAEs."""
        if self.made_as is not None or self.sae.config.get("architecture") == "random":
            return self.made_as or "random"
        frozen = [name for name in self.sae.config.get("freeze") or () if str(name).startswith("W_")]
        return f"frozen {' and '.join(frozen)}" if frozen else None

    @property
    def is_cross_layer(self) -> bool:
        """Whether this is a cross-layer transcoder."""
        return isinstance(self.sae, CrossLayerTranscoder)

    @property
    def spliced_at(self) -> list[str]:
        """The hook points where the SAE is spliced in, each in a separate run.

        A cross-layer transcoder is spliced in at its whole group in one run, or not at all if its latents cannot be
        chosen layer by layer.
        """
        if isinstance(self.sae, CrossLayerTranscoder):
            return [self.target] if self.sae.chooses_by_layer else []
        return members(self.target)

    def description(self) -> dict[str, Any]:
        """Return the fields that identify the SAE in `metrics.json`; `architecture` as trained, not as saved."""
        known = {"architecture": self.sae.architecture} | self.sae.metadata | self.sae.config
        return {
            "name": self.name,
            "architecture": known["architecture"],
            "baseline": self.baseline,
            "hook_point": self.hook_point,
            "target_hook_point": self.target,
            "d_in": self.sae.d_in,
            "d_sae": self.sae.d_sae,
            **{key: known.get(key) for key in SPARSITY_KEYS},
            **{f"published_{key}": value for key, value in self._published().items()},
        }

    def _published(self) -> dict[str, float]:
        """Return the figures that the SAE's release states, if it does."""
        stated = self.sae.metadata.get("published")
        stated = stated if isinstance(stated, dict) else {}
        return {
            key: float(stated[key])
            for key in ("l0", "explained_variance")
            if isinstance(stated.get(key), int | float) and not isinstance(stated[key], bool)
        }


def sae_folders(saes: str | list[str]) -> list[Path]:
    """Return the SAEs in a sweep's folder and its sub-folders, or those listed, without duplicates; `2` before `10`.

    What is on the Hub is downloaded. A line on standard error names each folder of weights that no format recognises.

    Raises:
        MissingFileError: a path does not exist or contains no SAE.
        HubError, SaeError: the Hub does not give an SAE.
    """
    found: list[Path] = []
    for source in [saes] if isinstance(saes, str) else saes:
        path = locate_source(source, several=True).path
        if not path.exists():
            raise MissingFileError(f"no SAE folder at '{source}'; give the output folder of `thresher train`")
        inside, notes = _inside(path)
        if not inside:
            raise MissingFileError(f"no SAE in '{source}': expected {CONFIG_NAME} in it or in one of its folders")
        for note in notes:
            _log.info(f"note: {note}")
        found += inside
    once: dict[Path, Path] = {}
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _inside(path: Path) -> tuple[list[Path], list[str]]:
    """Return the SAEs at and below a path, also those whose weights are missing, and what is not recognised."""
    here = [sae for _, sae in find_saes(path)]
    if here or not path.is_dir():
        return here, []
    if (path / CONFIG_NAME).is_file():
        return [path], []
    found, notes = [], []
    for entry in sorted(path.iterdir(), key=natural_order):
        if entry.is_dir() and not entry.name.startswith("."):
            if (entry / CONFIG_NAME).is_file():
                found.append(entry)
                continue
            inside, unknown = walk_saes(entry)
            found += [sae for _, sae in inside]
            notes += unknown
    return found, notes


def _has_sae(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or is_sae(folder)


def unique_names(folders: list[Path]) -> list[str]:
    """Return each folder's printable name, with as many parent folders as it takes to make all names different."""
    parts = [[printable(part) for part in folder.absolute().parts] for folder in folders]
    depth = 1
    while len(names := ["/".join(path[-depth:]) for path in parts]) != len(set(names)):
        depth += 1
    return names


def diverged_saes(saes: str | list[str]) -> dict[str, str]:
    """Return, by name, why the SAEs without weights diverged."""
    reasons = {}
    for path in map(Path, [saes] if isinstance(saes, str) else saes):
        for note in sorted(path.glob(f"*/{DIVERGED_NAME}")):
            if not _has_sae(note.parent):
                reasons[printable(note.parent.name)] = _reason_in(note)
    return reasons


def divergence_notes(saes: list[EvaluatedSae]) -> dict[str, str]:
    """Return, by name, a note on each SAE that diverged in a later run but still has its earlier weights."""
    notes = {sae.name: sae.path / DIVERGED_NAME for sae in saes}
    return {
        name: f"diverged when training continued ({_reason_in(note)}); these are its earlier weights"
        for name, note in notes.items()
        if note.is_file()
    }


def _reason_in(note: Path) -> str:
    try:
        return str(json.loads(note.read_bytes())["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return "no reason recorded"


def load_saes(
    folders: list[Path], store: ActivationStore, device: str, failed: dict[str, str] | None = None
) -> list[EvaluatedSae]:
    """Load every SAE and check it against the store's hook points and widths.

    With `failed`, an SAE that cannot be read (damaged, incomplete, NaN, of an unsupported kind) is left out, and
    `failed` gets the reason under its name. If no SAE can be read, the last one's error is raised.

    Raises:
        HookPointError: an SAE was trained at a hook point that the store lacks.
        MissingFileError: a file of an SAE is missing.
        SaeError: an SAE expects rows of another width, cannot be read, or names no hook point.
    """
    loaded = []
    for name, folder in zip(unique_names(folders), folders, strict=True):
        try:
            sae = Sae.load(folder).to(device).eval()
        except (SaeError, MissingFileError) as error:
            if failed is None or len(failed) == len(folders) - 1:
                raise
            failed[name] = str(error)
            continue
        hook_point = canonical_hook_point(sae.hook_point)
        if sae.wiring_kind in ("crosscoder", "cross_layer"):
            hook_point = group_name(map(canonical_hook_point, sae.reads))
        if sae.model_processing:
            raise SaeError(
                f"SAE '{name}' was trained on a model loaded with {sae.model_processing[0]} = true, whose activations "
                "are not those of the published model; it cannot be evaluated on a store"
            )
        if not hook_point:
            raise SaeError(
                f"SAE '{name}' does not say which hook point it reads; set `hook_point` of the SAE that Sae.load "
                "returns, and save it"
            )
        try:
            target = _target(sae)
        except SaeError as error:
            raise SaeError(f"SAE '{name}': {error}") from None
        for group, d, role in ((hook_point, sae.d_in, "reads"), (target, sae.d_out, "reconstructs")):
            absent = [name for name in members(group) if name not in store.hook_points]
            if absent:
                raise HookPointError(
                    f"SAE '{name}' {role} '{absent[0]}', expected one of the store's hook points: "
                    f"{', '.join(store.hook_points)}; harvest that hook point, or leave this SAE out"
                )
            if d != width(store, group):
                raise SaeError(
                    f"SAE '{name}' {role} rows of width {d}, but store '{store.path}' has "
                    f"{width(store, group)} at '{group}'; evaluate it on a store of the model it was trained on"
                )
        loaded.append(EvaluatedSae(name, folder, sae, hook_point, target))
    return loaded


def _target(sae: Sae) -> str:
    """Return the name of the hook point or group that an SAE reconstructs."""
    if sae.wiring_kind in ("crosscoder", "cross_layer"):
        return group_name(map(canonical_hook_point, sae.writes))
    return sae.target_hook_point
