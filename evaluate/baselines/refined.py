"""Evaluate SAEs also in their refined form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...shared.core.errors import SaeError
from ...shared.sae.leave_one_out import refined
from ..config import EvaluateConfig
from ..metrics.encoding import rows_at_a_time
from ..metrics.held_out import HeldOut, training_rows
from ..saes.names import file_names
from ..saes.sae_folders import EvaluatedSae

THRESHOLD_ROWS = 65_536
"""Most training rows that thresholds are chosen from."""


def refined_saes(
    saes: Sequence[EvaluatedSae], rows: HeldOut, config: EvaluateConfig
) -> tuple[list[EvaluatedSae], dict[str, str]]:
    """Return the SAEs refined as `config.refine` says, saved in the output, and by name why others are not."""
    if config.refine == "none":
        return [], {}
    folders = file_names([sae.name for sae in saes])
    training = training_rows(rows.store, THRESHOLD_ROWS)
    found, reasons = [], {}
    for sae in saes:
        blocks = training.blocks([sae.hook_point], rows_at_a_time(sae.sae), str(sae.sae.device))
        try:
            again = refined(sae.sae, (block.activations[sae.hook_point] for block in blocks))
        except SaeError as error:
            reasons[sae.name] = f"not refined: {error}"
            continue
        path = Path(config.output) / "refined" / folders[sae.name]
        again.save(path)
        found.append(EvaluatedSae(f"{sae.name}+{config.refine}", path, again, sae.hook_point, sae.target))
    return found, reasons
