"""Describe what was evaluated, on which data, and which rows were excluded."""

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
    """Return the facts that all SAEs share: the data, the model, and which rows were excluded."""
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
    """Return the indexes' notes on their logit effects: the path to the logits, or why there are none."""
    notes = dict.fromkeys(str(index.metadata.get("logit_effects")) for index in (features or {}).values())
    return {"logit_effects": "; ".join(notes)} if notes else {}


def report_title(rows: HeldOut, model: str | None) -> str:
    """Return the report's title, with the model and dataset if they are known."""
    name = model or rows.store.metadata.get("model")
    dataset = rows.store.metadata.get("dataset")
    of_model = f" of {Path(str(name)).name}" if name else ""
    return f"Sparse autoencoders{of_model}" + (f" on {Path(str(dataset)).name}" if dataset else "")


def mask_description(store: ActivationStore) -> str:
    """Describe which rows the metrics are computed on."""
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
    """Return the lines below the table, which say what data the metrics were computed on."""
    lines = [
        f"offline  {rows.n_rows:,} rows of {rows.n_documents:,} held-out documents; {mask_description(rows.store)}"
    ]
    if model:
        n_tokens = next(row["n_model_tokens"] for row in metrics if row.get("n_model_tokens") is not None)
        lines.append(f"model    {model} on {n_tokens:,} of these tokens; scores against zero ablation")
    else:
        lines.append("model    not run")
    return "\n".join(lines)
