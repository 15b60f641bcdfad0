"""The SAEs of a run at earlier steps of their training, where it saved them. They are named `SAE@STEP`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....shared.sae.formats.files import CONFIG_NAME


@dataclass(frozen=True)
class SaeCheckpoint:
    """An SAE, `sae` in the run, as it was after some steps and tokens; `folder` is where it is."""

    sae: str
    step: int
    tokens: int
    folder: Path

    @property
    def name(self) -> str:
        """The name by which requests ask for it."""
        return f"{self.sae}@{self.step}"


def find_checkpoints(saes: Mapping[str, Path]) -> list[SaeCheckpoint]:
    """Return what training saved of SAEs on the way (`save_every_tokens`), given their folders, in its order."""
    found = []
    for name, path in saes.items():
        for config in sorted(path.glob(f"checkpoints/step-*/{CONFIG_NAME}")):
            try:
                said = json.loads(config.read_bytes())["metadata"]
                found.append(SaeCheckpoint(name, int(said["step"]), int(said["tokens"]), config.parent))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is not one of ours
    return found
