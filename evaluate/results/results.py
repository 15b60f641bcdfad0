"""The rows of metrics.json as they grow: written after every stage, and kept so that a restart need not repeat them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...shared.core.disk import write_file, writing
from ..saes.names import file_names, printable
from ..saes.sae_folders import EvaluatedSae
from .output import finite, write_metrics

PROGRESS_NAME = ".progress.json"


class Results:
    """One row per SAE, in order, and the reasons of those that failed.

    `digests` gives, by SAE, a digest of everything that its results depend on. What a stage found is kept under it in
    the output folder until `finish`, so that an evaluation that is interrupted and started again need not repeat it.
    """

    def __init__(
        self, output: Path, saes: Sequence[EvaluatedSae], failed: Mapping[str, str], digests: Mapping[str, str]
    ):
        self.output = output
        self.rows: dict[str, dict[str, Any]] = {sae.name: sae.description() | {"error": None} for sae in saes}
        self.files = file_names([*self.rows, *failed])
        self._saes = list(saes)
        self._digests = digests
        self._path = output / PROGRESS_NAME
        self._kept: dict[str, dict[str, Any]] = {
            digest: stages for digest, stages in _read(self._path).items() if digest in digests.values()
        }
        for name, reason in failed.items():
            self.rows[name] = {"name": name}
            self.fail(name, reason)

    @property
    def saes(self) -> list[EvaluatedSae]:
        """The SAEs that have not failed."""
        return [sae for sae in self._saes if sae.name not in self.failed]

    @property
    def failed(self) -> dict[str, str]:
        """The reasons of the SAEs that failed."""
        return {name: row["error"] for name, row in self.rows.items() if row.get("error")}

    def fail(self, name: str, reason: str) -> None:
        """Note that an SAE failed and why; what it has so far stays."""
        self.rows[name]["error"] = printable(reason)
        tqdm.write(f"failed  {name}: {printable(reason)}")

    def note(self, name: str, key: str, value: str) -> None:
        """Keep a value of an SAE for a restart, beside its results."""
        self._kept.setdefault(self._digests[name], {})[key] = value

    def noted(self, name: str, key: str) -> str | None:
        """Return a value that an interrupted evaluation kept of an SAE."""
        return self._kept.get(self._digests[name], {}).get(key)

    def waiting(self, stage: str, only: Container[str] | None = None) -> list[EvaluatedSae]:
        """Take over what is kept of a stage, and return the SAEs that still have to go through it.

        With `only`, what is kept of other SAEs than those named is not used.
        """
        waiting, n_kept = [], 0
        for sae in self.saes:
            kept = self._kept.get(self._digests[sae.name], {}).get(stage)
            if kept is None or (only is not None and sae.name not in only):
                waiting.append(sae)
            else:
                self._merge(sae.name, kept)
                n_kept += 1
        if n_kept:
            tqdm.write(f"kept    {stage} results of {n_kept} SAE{'s' * (n_kept != 1)} from an interrupted evaluation")
        return waiting

    def add(self, stage: str, name: str, values: Mapping[str, Any]) -> None:
        """Add what a stage found of an SAE to its row."""
        plain = finite(dict(values))
        self._kept.setdefault(self._digests[name], {})[stage] = plain
        self._merge(name, plain)

    def _merge(self, name: str, values: Mapping[str, Any]) -> None:
        row = self.rows[name]
        intervals = {**(row.get("confidence_95") or {}), **(values.get("confidence_95") or {})}
        per_hook = {part["hook_point"]: part for part in row.get("per_hook") or ()}
        row |= values
        if "confidence_95" in values:
            row["confidence_95"] = intervals or None
        if per_hook:
            row["per_hook"] = [per_hook[part["hook_point"]] | part for part in row["per_hook"]]

    def write(self) -> list[dict[str, Any]]:
        """Write metrics.json and metrics.parquet as they are now, and what a restart can use; return the rows."""
        rows = list(self.rows.values())
        write_metrics(self.output, rows)
        write_file(self._path, json.dumps(self._kept).encode())
        return rows

    def remove_stale(self) -> None:
        """Remove what earlier evaluations wrote of SAEs that now have no results."""
        for name in self.failed:
            if "explained_variance" not in self.rows[name]:
                file = self.files[name]
                paths = [self.output / f"{kind}/{file}.parquet" for kind in ("latents", "features")]
                with writing(self.output):
                    for path in paths:
                        path.unlink(missing_ok=True)
                    shutil.rmtree(self.output / "neuronpedia" / file, ignore_errors=True)

    def finish(self) -> None:
        """Remove what was kept for a restart."""
        with writing(self._path):
            self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """Return what an interrupted evaluation kept; nothing if it cannot be read."""
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
