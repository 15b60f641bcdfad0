"""Judge SAEs: held-out rows of the store, then the model with each SAE spliced in, then the report."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from ..shared.core.config import to_toml
from ..shared.core.disk import write_file, writing
from ..shared.core.errors import SaeError
from .config import EvaluateConfig
from .features.export import export_indexes
from .metrics.comparison import compare_dictionaries
from .prepare import prepare
from .report.write import write_report
from .results.output import loss_curve, write_rows
from .results.provenance import footer, logit_effects_note, provenance, report_title
from .results.results import Results
from .results.table import metrics_table
from .saes.names import printable
from .saes.origin import note_lines
from .stages import index_features, judge_in_model, judge_offline, probe, result_digests


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluate every SAE on the store's held-out contexts; write and return the metrics.

    The results are written after each stage. An SAE that fails has its reason under `error`, and the others go on. What
    an interrupted evaluation finished is used again if nothing that it depends on has changed.

    Raises:
        ThresherError: what `prepare` refuses, before any row is read.
        SaeError: every SAE failed.
        NonFiniteError: the model's own predictions are not finite.
        DiskSpaceError, OutputError: the results cannot be written.
    """
    given = prepare(config)
    for line in note_lines(given.notes):
        tqdm.write(line, file=sys.stderr)
    output = given.output
    write_file(output / "config.toml", to_toml(config).encode())
    results = Results(output, given.saes, given.failed, result_digests(given))
    for name, notes in given.notes.items():
        results.rows[name]["notes"] = notes

    firings = judge_offline(given, results)
    _write(results)
    judge_in_model(given, results)
    _write(results)
    probe(given, results)
    _write(results)
    with writing(output / "dictionaries.parquet"):
        (output / "dictionaries.parquet").unlink(missing_ok=True)
    if config.dictionary:
        write_rows(
            output / "dictionaries.parquet",
            compare_dictionaries([sae for sae in results.saes if not sae.is_cross_layer], firings),
        )
    features = index_features(given, results)
    metrics = _write(results)
    results.remove_stale()

    title, facts = report_title(given.rows, given.model_name), provenance(given.rows, given.model_name)
    curves = {sae.name: loss_curve(sae.path) for sae in given.saes}
    report = write_report(
        output / "report.html",
        metrics,
        curves,
        features,
        title=title,
        provenance=facts | logit_effects_note(features),
        not_evaluated=results.failed | {name: f"diverged: {reason}" for name, reason in given.diverged.items()},
    )
    tqdm.write(metrics_table(metrics))
    tqdm.write(f"\n{footer(given.rows, given.model_name, metrics)}\nreport  {printable(str(report))}")
    if config.export and features:
        dataset = str(given.store.metadata.get("dataset") or "")
        export_indexes(features, output / "neuronpedia", given.model_name, dataset)
        tqdm.write(f"export  {printable(str(output / 'neuronpedia'))}")
    for name, reason in (results.failed | given.diverged).items():
        tqdm.write(f"{'failed' if name in results.failed else 'diverged in training'}  {name}: {reason}")
    results.finish()
    return metrics


def _write(results: Results) -> list[dict[str, Any]]:
    """Write the results so far; raise `SaeError` if no SAE is left."""
    metrics = results.write()
    if not results.saes:
        name, reason = next(iter(results.failed.items()))
        others = f", as {len(results.failed) - 1} others" if len(results.failed) > 1 else ""
        raise SaeError(f"no SAE could be evaluated: '{name}'{others}: {reason}")
    return metrics
