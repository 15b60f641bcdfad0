"""Short labels for the SAEs of a sweep, made of the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ...shared.model.hook_points import group_name, members
from .definitions import format_value


def point_labels(metrics: list[dict[str, Any]]) -> list[str]:
    """Return one short label per SAE, such as `k=32`; the width is added if it is not the most common one."""
    widths = Counter(row.get("d_sae") for row in metrics)
    common_width = next((width for width, n in widths.items() if n > max(1, len(metrics) // 2)), None)
    hooks = Counter(str(row.get("hook_point")) for row in metrics)
    usual = hooks.most_common(1)[0][0] if hooks else ""
    short = _short_hooks(list(hooks))
    labels = []
    for row in metrics:
        parts = []
        if row.get("k") is not None:
            parts.append(f"k={format_value(row['k'], 'integer')}")
        elif row.get("target_l0") is not None:
            parts.append(f"L0→{format_value(row['target_l0'], 'number')}")
        for key in ("l1_coefficient", "l0_coefficient"):
            if not parts and row.get(key) is not None:
                parts.append(f"λ={format_value(row[key], 'number')}")
        if len(widths) > 1 and row.get("d_sae") not in (None, common_width):
            parts.append(_width(row["d_sae"]))
        if parts and str(row.get("hook_point")) != usual:
            parts.append(short[str(row.get("hook_point"))])
        labels.append(" · ".join(parts) or str(row["name"]))
    seen = Counter(
        (label, row.get("architecture"), row.get("hook_point")) for label, row in zip(labels, metrics, strict=True)
    )
    return [
        str(row["name"]) if seen[label, row.get("architecture"), row.get("hook_point")] > 1 else label
        for label, row in zip(labels, metrics, strict=True)
    ]


def _short_hooks(hooks: list[str]) -> dict[str, str]:
    """Shorten each hook point by the trailing parts of its name that all hook points share."""
    parts = [name.split(".") for hook in hooks for name in members(hook)]
    shared = 0
    while parts and all(len(part) > shared + 1 and part[-1 - shared] == parts[0][-1 - shared] for part in parts):
        shared += 1
    return {hook: group_name(".".join(_drop_last(name.split("."), shared)) for name in members(hook)) for hook in hooks}


def _drop_last(parts: list[str], n: int) -> list[str]:
    return parts[: len(parts) - n]


def _width(d_sae: int) -> str:
    return f"{d_sae // 1024}k" if d_sae % 1024 == 0 else f"{d_sae:,}"
