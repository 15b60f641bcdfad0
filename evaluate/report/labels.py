"""Short names for the points of a sweep: what tells one SAE from the next, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .definitions import format_value


def point_labels(metrics: list[dict[str, Any]]) -> list[str]:
    """Return one short label per SAE, such as `k=32`, with the width only where widths differ."""
    widths = {row.get("d_sae") for row in metrics}
    labels = []
    for row in metrics:
        parts = []
        if row.get("k") is not None:
            parts.append(f"k={format_value(row['k'], 'integer')}")
        elif row.get("l1_coefficient") is not None:
            parts.append(f"λ={format_value(row['l1_coefficient'], 'number')}")
        if len(widths) > 1 and row.get("d_sae") is not None:
            parts.append(_width(row["d_sae"]))
        labels.append(" · ".join(parts) or str(row["name"]))
    seen = Counter(
        (label, row.get("architecture"), row.get("hook_point")) for label, row in zip(labels, metrics, strict=True)
    )
    return [
        str(row["name"]) if seen[label, row.get("architecture"), row.get("hook_point")] > 1 else label
        for label, row in zip(labels, metrics, strict=True)
    ]


def _width(d_sae: int) -> str:
    return f"{d_sae // 1024}k" if d_sae % 1024 == 0 else f"{d_sae:,}"
