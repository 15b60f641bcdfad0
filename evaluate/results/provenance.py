"""Say what was evaluated, on what, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...shared.core.version import thresher_version
from ...shared.store import ActivationStore
from ..features.files import FeatureIndex
from ..metrics.held_out import HeldOut

ABLATION = "zero: the activation is set to zero at every position, masked ones too"
CE_MASK = "cross-entropy of the next token where neither it nor the token before it is masked"


def provenance(rows: HeldOut, model: str | None) -> dict[str, Any]:
    """Return what was evaluated, on what, and what was left out: the same for every SAE."""
    return {
        "n_rows": rows.n_rows,
        "n_contexts": len(rows.contexts),
        "n_documents": rows.n_documents,
        "mask": mask_description(rows.store),
        "model": model,
        "ce_mask": CE_MASK if model else None,
        "ablation": ABLATION if model else None,
        "store": str(rows.store.path),
        "dataset": rows.store.metadata.get("dataset"),
        "thresher_version": thresher_version(),
    }


def logit_effects_note(features: Mapping[str, FeatureIndex] | None) -> dict[str, str]:
    """Return what the indexes say their logit effects go through, or why they have none."""
    notes = dict.fromkeys(str(index.metadata.get("logit_effects")) for index in (features or {}).values())
    return {"logit_effects": "; ".join(notes)} if notes else {}


def report_title(rows: HeldOut, model: str | None) -> str:
    """Return the report's title: what the sweep was trained on, as far as the store says."""
    name = model or rows.store.metadata.get("model")
    dataset = rows.store.metadata.get("dataset")
    of = f" of {Path(str(name)).name}" if name else ""
    return f"Sparse autoencoders{of}" + (f" on {Path(str(dataset)).name}" if dataset else "")


def mask_description(store: ActivationStore) -> str:
    """Say which rows are left out of every metric."""
    masked = list(store.mask_token_ids)
    rows = "every held-out row"
    if store.used_roles is not None:
        rows = f"held-out rows of role {' or '.join(store.used_roles)}"
    elif store.has_roles:
        rows = "held-out rows that packing did not place"
    elif masked:
        return f"held-out rows whose token is not in {masked}"
    return rows + (f" and whose token is not in {masked}" if masked else "")


def footer(rows: HeldOut, model: str | None, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines under the table: on what the figures rest."""
    lines = [
        f"offline  {rows.n_rows:,} rows of {rows.n_documents:,} held-out documents; {mask_description(rows.store)}"
    ]
    if model:
        n_tokens = next(row["n_model_tokens"] for row in metrics if row.get("n_model_tokens") is not None)
        lines.append(f"model    {model} on {n_tokens:,} of these tokens; scores against zero ablation")
    else:
        lines.append("model    not run")
    return "\n".join(lines)
