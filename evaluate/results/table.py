"""The table that `thresher evaluate` prints: at most 100 columns wide, one section per hook point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100
_AFTER_INTERVAL = 5

ResultRow = Mapping[str, Any]


def metrics_table(metrics: Sequence[ResultRow]) -> str:
    """Return the rows of `metrics.json` as a table, with a dash for values that were not measured.

    SAEs that could not be read are left out. A column for the explained variance without outliers is there if some
    hook point has outliers.
    """
    metrics = [row for row in metrics if row.get("hook_point")]
    header = ["SAE", "d_sae", "k or λ", "expl. var", "± 95%", "L0", "dead", "CE score", "KL score"]
    cells = [_cells(row) for row in metrics]
    if any(row.get("outlier_rows") for row in metrics):
        for line, value in zip(
            [header, *cells], ["usual rows", *map(_explained_without_outliers, metrics)], strict=True
        ):
            line.insert(_AFTER_INTERVAL, value)
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    hook_points = dict.fromkeys(str(row["hook_point"]) for row in metrics)
    for hook_point in hook_points:
        lines += ["", hook_point, _line(header, widths), "─" * (sum(widths) + 2 * len(widths) - 2)]
        lines += [
            _line(line, widths) for row, line in zip(metrics, cells, strict=True) if row["hook_point"] == hook_point
        ]
    return "\n".join(lines[1:])


def outlier_lines(metrics: Sequence[ResultRow]) -> list[str]:
    """Return a line per hook point with massive activations: how many rows, and how much of the variance they hold."""
    found = {row["hook_point"]: row for row in metrics if row.get("outlier_rows")}
    return [
        f"outliers  {row['outlier_rows']:,} of {row['n_rows']:,} rows hold {row['outlier_variance_share']:.0%} of the "
        f"variance that SAEs of {hook_point} reconstruct; 'usual rows' is without them"
        for hook_point, row in found.items()
    ]


def published_lines(metrics: Sequence[ResultRow]) -> list[str]:
    """Return a line per SAE whose release states its L0 or explained variance, beside what was measured here."""
    lines = []
    for row in metrics:
        figures = [
            f"{title} {row[f'published_{key}']:.{decimals}f}, here {number(row.get(key), decimals)}"
            for key, title, decimals in (("l0", "L0", 1), ("explained_variance", "explained variance", 4))
            if row.get(f"published_{key}") is not None
        ]
        lines += [f"published  {row['name']}: {'; '.join(figures)}"] if figures else []
    return lines


def _explained_without_outliers(row: ResultRow) -> str:
    key = "explained_variance_without_outliers" if row.get("outlier_rows") else "explained_variance"
    return number(row.get(key), 4)


def _cells(row: ResultRow) -> list[str]:
    interval = (row.get("confidence_95") or {}).get("explained_variance")
    return [
        str(row["name"]),
        f"{row['d_sae']:,}",
        _sparsity(row),
        number(row.get("explained_variance"), 4),
        f"{(interval[1] - interval[0]) / 2:.4f}" if interval else "-",
        number(row.get("l0"), 1),
        percent(row.get("dead_fraction")),
        number(row.get("ce_loss_score"), 4),
        number(row.get("kl_div_score"), 4),
    ]


def _sparsity(row: ResultRow) -> str:
    if row.get("k") is not None:
        return f"{row['k']}"
    if row.get("target_l0") is not None:
        return f"L0 {row['target_l0']:g}"
    weights = [row[key] for key in ("l1_coefficient", "l0_coefficient") if row.get(key) is not None]
    return f"λ {weights[0]:g}" if weights else "-"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line with the name aligned to the left and the numbers to the right."""
    first = shorten(cells[0], widths[0]).ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])


def number(value: float | None, decimals: int) -> str:
    """Format a number with a fixed number of decimals; None gives a dash."""
    return "-" if value is None else f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
    """Format a fraction as a percentage; None gives a dash."""
    return "-" if value is None else f"{value:.1%}"


def shorten(text: str, width: int) -> str:
    """Replace the middle of a text that is wider than `width` with an ellipsis."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"
