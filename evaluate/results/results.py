"""The rows of metrics.json, written after every stage so that an interrupted evaluation can resume."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...shared.core.disk import write_file, writing
from ..saes.names import file_names, printable
from ..saes.sae_folders import EvaluatedSae
from .output import finite, write_metrics

_log = logging.getLogger(__name__)

PROGRESS_NAME = ".progress.json"


class Results:
    """One row per SAE, in order; the rows of SAEs that failed hold the reason.

    `digests` holds, by SAE name, a digest of everything that its results depend on. The results of each stage are saved
    under that digest in the output folder until `finish`, and an evaluation that resumes reuses them.
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
        self._saved: dict[str, dict[str, Any]] = {
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
        """Why each SAE that failed did so, by name."""
        return {name: row["error"] for name, row in self.rows.items() if row.get("error")}

    def fail(self, name: str, reason: str) -> None:
        """Record why an SAE failed; keep the results that it has so far."""
        self.rows[name]["error"] = printable(reason)
        _log.warning(f"{name} failed: {printable(reason)}")

    def save_value(self, name: str, key: str, value: str) -> None:
        """Save a value beside an SAE's results, for an evaluation that resumes."""
        self._saved.setdefault(self._digests[name], {})[key] = value

    def saved_value(self, name: str, key: str) -> str | None:
        """Return a value that an interrupted evaluation saved for an SAE, or None."""
        return self._saved.get(self._digests[name], {}).get(key)

    def reuse_saved(self, stage: str, only: Container[str] | None = None) -> list[EvaluatedSae]:
        """Reuse the saved results of a stage, and return the SAEs that still have to go through it.

        With `only`, reuse the results of these SAEs only.
        """
        remaining, n_reused = [], 0
        for sae in self.saes:
            saved = self._saved.get(self._digests[sae.name], {}).get(stage)
            if saved is None or (only is not None and sae.name not in only):
                remaining.append(sae)
            else:
                self._merge(sae.name, saved)
                n_reused += 1
        if n_reused:
            _log.info(
                f"reused  {stage} results of {n_reused} SAE{'s' * (n_reused != 1)} from an interrupted evaluation"
            )
        return remaining

    def add(self, stage: str, name: str, values: Mapping[str, Any]) -> None:
        """Add the values that a stage computed for an SAE to its row."""
        plain = finite(dict(values))
        self._saved.setdefault(self._digests[name], {})[stage] = plain
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
        """Write metrics.json, metrics.parquet and the saved progress; return the rows."""
        rows = list(self.rows.values())
        write_metrics(self.output, rows)
        write_file(self._path, json.dumps(self._saved).encode())
        return rows

    def remove_stale(self) -> None:
        """Remove files that earlier evaluations wrote for SAEs that now have no results."""
        for name in self.failed:
            if "explained_variance" not in self.rows[name]:
                file = self.files[name]
                paths = [self.output / f"{kind}/{file}.parquet" for kind in ("latents", "features")]
                with writing(self.output):
                    for path in paths:
                        path.unlink(missing_ok=True)
                    shutil.rmtree(self.output / "neuronpedia" / file, ignore_errors=True)

    def finish(self) -> None:
        """Remove the saved progress."""
        with writing(self._path):
            self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """Return the progress of an interrupted evaluation; empty if it cannot be read."""
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}
