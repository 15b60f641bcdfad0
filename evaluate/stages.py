"""The stages of an evaluation. Each one adds metrics for every SAE to the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64

from ..shared.core.errors import NonFiniteError
from ..shared.core.version import thresher_version
from .features.build import FeatureSettings, build_feature_index
from .features.files import FeatureIndex
from .ground_truth.compare import ground_truth
from .ground_truth.store_truth import read_store_truth
from .metrics.bootstrap import confidence_intervals, point_estimates
from .metrics.comparison import Fired
from .metrics.crosscoder import norm_share_columns, per_hook_metrics
from .metrics.dictionary import geometry
from .metrics.offline import SaeSums, accumulate, offline_metrics
from .metrics.reconstruction import InputSums
from .prepare import PreparedEvaluation
from .results.output import latents_path, write_latents, write_table
from .results.provenance import provenance
from .results.results import Results
from .saes.digests import digest_of, sae_digest
from .saes.sae_folders import EvaluatedSae
from .suite.amortisation import amortisation_gap
from .suite.first_letter import first_letter_tasks
from .suite.stability import matched_cosines
from .with_model.labelled_texts import labelled_probing
from .with_model.probing import sparse_probing
from .with_model.splice_losses import accumulate_losses, per_hook_losses, run_name, splice_metrics

RESULTS_VERSION = 2
"""Increased whenever the same inputs give different results."""
IGNORED_SETTINGS = ("store", "saes", "output", "cache", "cache_bytes", "feature_rows", "export", "allow_other_model")
"""Settings that no result depends on. The store's checksums identify it, not its path."""
BAD_PREDICTIONS = "with this SAE spliced in, the model's predictions are NaN or infinite"
NO_DIRECTIONS = "decoder directions are not compared: latents of different layers write to different numbers of targets"
FIRINGS = "firings"
"""Key of the digest of the firings in an SAE's `latents` file."""


def result_digests(prepared: PreparedEvaluation) -> dict[str, str]:
    """Return, by SAE name, a digest of everything that its results depend on."""
    settings = {
        key: value for key, value in msgspec.to_builtins(prepared.config).items() if key not in IGNORED_SETTINGS
    }
    found = (prepared.rows.contexts, prepared.rows.usable, prepared.rows.group, prepared.rows.unmasked)
    rows = [torch.from_numpy(values) for values in found if values is not None]
    model = [] if prepared.model is None else list(prepared.model.state_dict().values())
    facts = [
        RESULTS_VERSION,
        thresher_version(),
        settings,
        prepared.device,
        prepared.store.manifest.checksum,
        prepared.model_name,
        *([] if prepared.labelled is None else prepared.labelled.source),
    ]
    context = digest_of(facts, [*rows, *model])
    return {
        sae.name: digest_of([context, sae.name, sae.hook_point, sae.target, sae_digest(sae.sae)])
        for sae in prepared.saes
    }


@dataclass(frozen=True)
class SavedLatents:
    """The firings of an SAE's latents, read from the file that an interrupted evaluation wrote."""

    firings: Int64[np.ndarray, " d_sae"]


def evaluate_offline(prepared: PreparedEvaluation, results: Results) -> dict[str, Fired]:
    """Compute the offline metrics in one pass over the held-out rows; return every SAE's latent firings by name."""
    config = prepared.config
    fired: dict[str, Fired] = {}
    for sae in results.saes:
        if (saved := _saved_latents(results, sae)) is not None:
            fired[sae.name] = saved
    remaining = results.reuse_saved("offline", only=fired)
    if not remaining:
        return fired
    inputs, sums = accumulate(remaining, prepared.rows, config.block_rows, prepared.device)
    for sae in remaining:
        reason = _not_finite(sae, inputs[sae.target], sums[sae.name])
        if reason is not None:
            results.fail(sae.name, reason)
            continue
        measured, intervals = offline_metrics(inputs[sae.target], sums[sae.name], config.bootstrap_samples, config.seed)
        found: dict[str, Any] = provenance(prepared.rows, prepared.model_name) | measured
        latents = sums[sae.name].latents
        found |= per_hook_metrics(sae.sae, inputs, sums[sae.name].by_hook_point, latents.firings)
        found["confidence_95"] = {name: list(bounds) for name, bounds in intervals.items()}
        columns = {}
        if config.dictionary and sae.is_cross_layer:
            found["dictionary_note"] = NO_DIRECTIONS
        elif config.dictionary:
            columns, summary = geometry(sae.sae, latents.firings, config.n_neighbours)
            found |= summary
        fired[sae.name] = latents
        results.save_value(sae.name, FIRINGS, _firings_digest(latents.firings))
        write_latents(results.output, results.files[sae.name], latents, columns | norm_share_columns(sae))
        results.add("offline", sae.name, found)
    return fired


def _saved_latents(results: Results, sae: EvaluatedSae) -> SavedLatents | None:
    """Return the firings that an interrupted evaluation wrote for an SAE; None if they are missing or changed."""
    digest = results.saved_value(sae.name, FIRINGS)
    if digest is None:
        return None
    try:
        table = pq.read_table(latents_path(results.output, results.files[sae.name]), columns=["firings"])
    except (OSError, ValueError):  # includes Arrow's errors
        return None
    firings = table["firings"].to_numpy()
    return SavedLatents(firings) if _firings_digest(firings) == digest else None


def _firings_digest(firings: np.ndarray) -> str:
    return digest_of("firings", [torch.tensor(firings)])


def _not_finite(sae: EvaluatedSae, inputs: InputSums, sums: SaeSums) -> str | None:
    """Return why an SAE's metrics would not be finite; None if they are finite."""
    if not all(np.isfinite(values).all() for values in inputs.sums().values()):
        return f"the store's rows at '{sae.target}' are not finite; check it with `thresher store verify`"
    if not all(np.isfinite(values).all() for values in sums.reconstruction.sums().values()):
        return "its latents or reconstructions of held-out rows are NaN or infinite; train it again, or leave it out"
    return None


def compare_with_truth(prepared: PreparedEvaluation, results: Results) -> None:
    """Compare every SAE's latents with the features of a synthetic store; does nothing for another store."""
    config, truth = prepared.config, read_store_truth(prepared.store)
    if truth is None or config.ground_truth_rows == 0:
        return
    remaining = results.reuse_saved("ground_truth")
    for name, found in ground_truth(remaining, truth.to(prepared.device), config).items():
        results.add("ground_truth", name, found.metrics)
        write_table(results.output / "ground_truth" / f"{results.files[name]}.parquet", found.latents)


def evaluate_in_model(prepared: PreparedEvaluation, results: Results) -> None:
    """Run the model with every SAE spliced in and compute the losses.

    Raises:
        NonFiniteError: the model's own predictions are not finite.
    """
    if prepared.model is None:
        return
    config, remaining = prepared.config, results.reuse_saved("model")
    if not remaining:
        return
    part = prepared.rows.subset(config.model_rows)
    losses = accumulate_losses(prepared.model, prepared.hook_points, remaining, part, config.batch_size)
    for sae in remaining:
        targets = sae.spliced_at
        if not targets:
            results.add("model", sae.name, {})
            continue
        first = losses[run_name(sae, targets[0])]
        if not np.isfinite(first["ce_clean"]).all():
            raise NonFiniteError(
                f"the predictions of '{prepared.model_name}' on the stored tokens are NaN or infinite with data type "
                f'{prepared.model.dtype}; try model_dtype = "float32"'
            )
        found: dict[str, Any] = {"n_model_tokens": int(first["n_kl"].sum()), "n_predictions": int(first["n_ce"].sum())}
        found |= per_hook_losses(sae, losses)
        is_finite = all(np.isfinite(losses[run_name(sae, target)]["kl_sae"]).all() for target in targets)
        if sae.name in losses:
            found |= point_estimates(splice_metrics, losses[sae.name])
        if sae.name in losses and is_finite:
            intervals = confidence_intervals(splice_metrics, losses[sae.name], config.bootstrap_samples, config.seed)
            found["confidence_95"] = {name: list(bounds) for name, bounds in intervals.items()}
        results.add("model", sae.name, found if is_finite else found | {"error": BAD_PREDICTIONS})
        if not is_finite:
            results.fail(sae.name, BAD_PREDICTIONS)


def probe(prepared: PreparedEvaluation, results: Results) -> None:
    """Run k-sparse probing on every SAE; without probe tasks, do nothing."""
    if not prepared.tasks:
        return
    remaining = results.reuse_saved("probes")
    if remaining:
        found = sparse_probing(
            remaining, prepared.rows.subset(prepared.config.model_rows), prepared.config, prepared.tasks
        )
        for name, values in found.items():
            results.add("probes", name, values)


def probe_labels(prepared: PreparedEvaluation, results: Results) -> None:
    """Run k-sparse probing on labelled texts; without texts, do nothing."""
    if prepared.labelled is None or prepared.model is None:
        return
    remaining = results.reuse_saved("labels")
    if remaining:
        found = labelled_probing(
            remaining, prepared.labelled, prepared.model, prepared.hook_points, prepared.store, prepared.config
        )
        for name, values in found.items():
            results.add("labels", name, values)


def measure_suite(prepared: PreparedEvaluation, results: Results, fired: dict[str, Fired]) -> None:
    """Measure stability over seeds, amortisation gaps and first letters; does nothing unless `suite` is full."""
    if prepared.config.suite != "full":
        return
    remaining = results.reuse_saved("suite")
    alone = [sae for sae in remaining if sae.hook_point == sae.target and sae.sae.wiring_kind == "sae"]
    repeated = [sae for sae in results.saes if not sae.is_cross_layer and sae.made_as is None]
    found: dict[str, dict[str, Any]] = dict(matched_cosines(repeated, fired))
    for sae in alone:
        found[sae.name] = found.get(sae.name, {}) | amortisation_gap(sae, prepared.rows, prepared.device)
    if prepared.tokenizer is not None:
        part = prepared.rows.subset(prepared.config.model_rows)
        tasks = first_letter_tasks(part, prepared.tokenizer, prepared.config.seed)
        for name, values in sparse_probing(remaining, part, prepared.config, tasks).items() if tasks else ():
            intervals = _of_letters(values["confidence_95"])
            found[name] = found.get(name, {}) | _of_letters(values) | {"confidence_95": intervals}
    for sae in remaining:
        results.add("suite", sae.name, found.get(sae.name, {}))


def _of_letters(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("probe_", "first_letter_", 1): value for key, value in values.items()}


def index_features(prepared: PreparedEvaluation, results: Results) -> dict[str, FeatureIndex] | None:
    """Build the feature index of every SAE whose latents are never negative.

    Return None if it is switched off or the store contains no tokens.
    """
    if not prepared.has_features:
        return None
    settings = FeatureSettings(max_rows=prepared.config.feature_rows)
    return build_feature_index(
        prepared.store,
        [sae for sae in results.saes if sae.made_as is None and not sae.sae.is_signed],
        results.output / "features",
        model=prepared.model,
        tokenizer=prepared.tokenizer,
        settings=settings,
        on_failure=results.fail,
    )
