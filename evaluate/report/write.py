"""Write the report as one HTML page that contains its data and scripts and needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...shared.core.disk import write_file
from ...shared.core.paths import user_path
from ..features.files import FeatureIndex
from ..metrics.held_out import HeldOut
from ..results.provenance import logit_effects_note, provenance, report_title
from .comparison import COMPARED
from .definitions import PER_HOOK, PROVENANCE_LABELS, Column, columns, format_value, significant
from .feature_blocks import Explanations, pack_features
from .labels import point_labels

SCRIPTS = ("dom.js", "axes.js", "pareto.js", "curves.js", "histograms.js", "table.js")
BROWSER_SCRIPTS = ("blocks.js", "latent.js", "browser.js")
CURVE_POINTS = 400


def write_report(
    path: str | Path,
    metrics: Sequence[Mapping[str, Any]],
    loss_curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    features: Mapping[str, FeatureIndex] | None = None,
    *,
    title: str = "Sparse autoencoder sweep",
    provenance: Mapping[str, Any] | None = None,
    not_evaluated: Mapping[str, str] | None = None,
    explanations: Mapping[str, Explanations] | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML file that shows a sweep's metrics and loss curves, and return its path.

    `metrics` are the rows of metrics.json; `loss_curves` are the lines of each SAE's metrics.jsonl, by name; `features`
    are the SAEs' feature indexes, by name. `provenance` describes what was evaluated and on which data, and
    `not_evaluated` gives, by name, why SAEs failed. `comparison` is what `compare_with_baselines` returns. Feature data
    that is too large for one page is written to a folder beside it.
    """
    path = user_path(path)
    rows = [dict(row) for row in metrics if row.get("hook_point")]
    packed = pack_features(features, path, explanations) if features else None
    scripts = (*SCRIPTS, *(BROWSER_SCRIPTS if packed else ()), "main.js")
    data = {"features": packed.catalogue if packed else None, **overview_data(rows, loss_curves or {})}
    table = columns(rows)
    page = (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            rows=rows,
            columns=table,
            hook_points=list(dict.fromkeys(str(row.get("hook_point")) for row in rows)),
            has_model_metrics=any(row.get("ce_loss_score") is not None for row in rows),
            provenance={key: value for key, value in (provenance or {}).items() if value is not None},
            across=[(str(row["name"]), part) for row in rows for part in row.get("per_hook") or ()],
            across_columns=PER_HOOK,
            partly_measured=any(row.get("per_hook") and row.get("ce_loss_score", 0) is None for row in rows),
            provenance_labels=PROVENANCE_LABELS,
            not_evaluated=dict(not_evaluated or {}),
            comparison=[(name, part, _compared(part)) for name, part in (comparison or {}).items()],
            notes=_notes(rows),
            format_value=format_value,
            interval=_interval,
            sort_key=_sort_key,
            style=asset("report.css"),
            script=Markup("\n".join(asset(name) for name in scripts)),
            blocks=packed.inline if packed else [],
            has_features=packed is not None,
            has_folder=packed is not None and packed.folder is not None,
            data=json_for_script(data),
        )
    )
    write_file(path, page.encode())
    return path


def write_evaluation_report(
    output: Path,
    rows: HeldOut,
    model: str | None,
    metrics: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    features: Mapping[str, FeatureIndex] | None,
    *,
    explanations: Mapping[str, Explanations] | None = None,
    failed: Mapping[str, str] | None = None,
    diverged: Mapping[str, str] | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html` of an evaluation in its output folder, and return its path.

    `rows` are the held-out rows that were evaluated, `model` the model that was run. `failed` and `diverged` give
    reasons by SAE name.
    """
    return write_report(
        output / "report.html",
        metrics,
        curves,
        features,
        title=report_title(rows, model),
        provenance=provenance(rows, model) | logit_effects_note(features),
        not_evaluated=dict(failed or {}) | {name: f"diverged: {reason}" for name, reason in (diverged or {}).items()},
        explanations=explanations,
        comparison=comparison,
    )


def overview_data(
    rows: Sequence[Mapping[str, Any]], loss_curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return what the plots of a sweep are drawn from: `saes`, one entry for each row of metrics, and `curves`."""
    plain = [dict(row) for row in rows]
    return {
        "saes": [_sae(row, label) for row, label in zip(plain, point_labels(plain), strict=True)],
        "curves": {name: thin_curve(lines) for name, lines in loss_curves.items() if lines},
    }


def thin_curve(lines: Sequence[Mapping[str, Any]], n_points: int = CURVE_POINTS) -> dict[str, list[float | None]]:
    """Convert log lines to columns of at most about `n_points` values; the first and last lines are kept."""
    stride = max(1, math.ceil(len(lines) / n_points))
    kept = list(lines[::stride])
    if kept[-1] is not lines[-1]:
        kept.append(lines[-1])
    keys = dict.fromkeys(key for line in kept for key in line if _is_number(line[key]))
    return {key: [_finite(line.get(key)) for line in kept] for key in keys}


def json_for_script(value: Any) -> Markup:
    """Return JSON that is safe inside a script element; NaN and infinity become null."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _sae(row: Mapping[str, Any], label: str) -> dict[str, Any]:
    keys = ("name", "architecture", "hook_point", "d_sae", "l0", "dead_fraction")
    plotted = ("explained_variance", "explained_variance_without_outliers", "ce_loss_score")
    histogram = row.get("density_histogram")
    bounds = row.get("confidence_95") or {}
    intervals = {key: bounds[key] for key in plotted if bounds.get(key)}
    return {"label": label, "density": histogram, "intervals": intervals} | {
        key: row.get(key) for key in keys + plotted
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return significant(value) if isinstance(value, float) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    return value if _is_number(value) and math.isfinite(value) else None


def _sort_key(value: Any) -> str:
    """Return the table's sort key for a value; the key of a missing value is the empty string."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if _is_number(value) else str(value)


def _interval(row: Mapping[str, Any], metric: Column) -> str:
    """Return a metric's confidence interval as text; empty if it has none."""
    bounds = (row.get("confidence_95") or {}).get(metric.key)
    if not bounds:
        return ""
    low, high = (format_value(bound, metric.style) for bound in bounds)
    return f"95% confidence interval {low} to {high}, by documents"


def _compared(part: Mapping[str, Any]) -> list[Column]:
    """Return the metrics of which a hook point has a baseline or a smallest difference."""
    known = {key for sae in part["saes"] for key in sae["metrics"]} | set(part["resolution"])
    return [metric for key, metric in COMPARED.items() if key in known]


def _notes(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return, by SAE name, how its training differs from the store."""
    return {str(row["name"]): "; ".join(row["notes"]) for row in rows if row.get("notes")}


def asset(name: str) -> Markup:
    """Return a file of the report, to be put into a page as it is."""
    return Markup(resources.files(__package__ or __name__).joinpath(name).read_text(encoding="utf-8"))


def environment() -> jinja2.Environment:
    """Return the environment of pages' templates."""
    loader = jinja2.FunctionLoader(lambda name: str(asset(name)))
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
