"""Evaluate SAEs: on held-out rows of the store, then in the model with each SAE spliced in; then write the report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..shared.core.config import configured, to_toml
from ..shared.core.disk import write_file, writing
from ..shared.core.errors import SaeError
from ..shared.core.terminal.progress import in_kernel
from ..shared.core.terminal.results import print_result
from .config import EvaluateConfig
from .explain.notes import shown_explanations
from .features.export import export_indexes
from .metrics.comparison import compare_dictionaries, training_settings
from .notebook.metrics_rows import MetricsRows
from .prepare import prepare_evaluation
from .report.comparison import baseline_lines, compare_with_baselines
from .report.write import write_evaluation_report
from .results.output import loss_curve, write_json, write_rows
from .results.provenance import footer
from .results.results import Results
from .results.table import metrics_table, outlier_lines, published_lines
from .saes.names import printable
from .saes.origin import note_lines
from .stages import (
    compare_with_truth,
    evaluate_in_model,
    evaluate_offline,
    index_features,
    measure_suite,
    probe,
    probe_labels,
    result_digests,
)

_log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig | str | Path | None = None, **settings: Any) -> MetricsRows:
    """Evaluate every SAE on the store's held-out contexts; write and return the metrics.

    The results are written after each stage. If an SAE fails, its row has the reason under `error` and the evaluation
    continues with the others. Results of an interrupted evaluation are reused if nothing that they depend on has
    changed. The configuration is an object, the path of a TOML file, or none; keywords replace its keys.

    Raises:
        ThresherError: the errors of `prepare_evaluation`, before any row is read.
        SaeError: every SAE failed.
        NonFiniteError: the model's own predictions are not finite.
        DiskSpaceError, OutputError: the results cannot be written.
    """
    config = configured(EvaluateConfig, config, settings)
    prepared = prepare_evaluation(config)
    for line in note_lines(prepared.notes):
        _log.info(line)
    output = prepared.output
    write_file(output / "config.toml", to_toml(config).encode())
    results = Results(output, prepared.saes, prepared.failed, result_digests(prepared))
    for name, notes in prepared.notes.items():
        results.rows[name]["notes"] = notes

    firings = evaluate_offline(prepared, results)
    _write(results)
    compare_with_truth(prepared, results)
    evaluate_in_model(prepared, results)
    _write(results)
    probe(prepared, results)
    probe_labels(prepared, results)
    measure_suite(prepared, results, firings)
    _write(results)
    with writing(output / "dictionaries.parquet"):
        (output / "dictionaries.parquet").unlink(missing_ok=True)
    if config.dictionary:
        write_rows(
            output / "dictionaries.parquet",
            compare_dictionaries(
                [sae for sae in results.saes if not sae.is_cross_layer and sae.made_as is None], firings
            ),
        )
    features = index_features(prepared, results)
    metrics = _write(results)
    results.remove_stale()

    comparison = compare_with_baselines(metrics, {sae.name: training_settings(sae) for sae in results.saes})
    write_json(output / "comparison.json", comparison)
    explanations = {name: shown_explanations(index) for name, index in (features or {}).items()}
    report = write_evaluation_report(
        output,
        prepared.rows,
        prepared.model_name,
        metrics,
        {sae.name: loss_curve(sae.path) for sae in prepared.saes},
        features,
        explanations=explanations,
        failed=results.failed,
        diverged=prepared.diverged,
        comparison=comparison,
    )
    if not in_kernel():  # a notebook shows the rows that are returned
        print_result(metrics_table(metrics))
    for line in (*outlier_lines(metrics), *published_lines(metrics), *baseline_lines(comparison)):
        print_result(line)
    print_result(f"\n{footer(prepared.rows, prepared.model_name, metrics)}\nreport  {printable(str(report))}")
    if config.export and features:
        dataset = str(prepared.store.metadata.get("dataset") or "")
        export_indexes(features, output / "neuronpedia", prepared.model_name, dataset, explanations)
        print_result(f"export  {printable(str(output / 'neuronpedia'))}")
    for name, reason in (results.failed | prepared.diverged).items():
        print_result(f"{'failed' if name in results.failed else 'diverged in training'}  {name}: {reason}")
    results.finish()
    return MetricsRows(metrics)


def _write(results: Results) -> list[dict[str, Any]]:
    """Write the results so far; raise `SaeError` if no SAE is left."""
    metrics = results.write()
    if not results.saes:
        name, reason = next(iter(results.failed.items()))
        others = f" (and {len(results.failed) - 1} others failed)" if len(results.failed) > 1 else ""
        raise SaeError(f"no SAE could be evaluated; '{name}': {reason}{others}")
    return metrics
