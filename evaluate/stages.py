"""The stages of an evaluation. Each one adds its metrics of every SAE to the results."""

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
from .metrics.bootstrap import confidence_intervals, point_estimates
from .metrics.comparison import Fired
from .metrics.crosscoder import norm_share_columns, per_hook_metrics
from .metrics.dictionary import geometry
from .metrics.offline import SaeSums, accumulate, offline_metrics
from .metrics.reconstruction import InputSums
from .prepare import Prepared
from .results.output import latents_path, write_latents
from .results.provenance import provenance
from .results.results import Results
from .saes.digests import digest_of, sae_digest
from .saes.sae_folders import EvaluatedSae
from .with_model.probing import sparse_probing
from .with_model.splice_losses import accumulate_losses, per_hook_losses, run_name, splice_metrics

RESULTS_VERSION = 1
"""Increased whenever the same inputs give different results."""
WITHOUT_EFFECT = ("store", "saes", "output", "cache", "cache_bytes", "feature_rows", "export", "allow_other_model")
"""Settings that no result depends on; the store is identified by its checksums."""
BAD_PREDICTIONS = "the model's predictions with it are NaN or infinite"
NO_DIRECTIONS = "latents of different layers write to different numbers of targets: their directions are not compared"
FIRINGS = "firings"
"""Key of the digest of the firings in an SAE's `latents` file."""


def result_digests(given: Prepared) -> dict[str, str]:
    """Return, by SAE name, a digest of everything that its results depend on."""
    settings = {key: value for key, value in msgspec.to_builtins(given.config).items() if key not in WITHOUT_EFFECT}
    found = (given.rows.contexts, given.rows.usable, given.rows.group, given.rows.unmasked)
    rows = [torch.from_numpy(values) for values in found if values is not None]
    model = [] if given.model is None else list(given.model.state_dict().values())
    facts = [
        RESULTS_VERSION,
        thresher_version(),
        settings,
        given.device,
        given.store.manifest.checksum,
        given.model_name,
    ]
    context = digest_of(facts, [*rows, *model])
    return {
        sae.name: digest_of([context, sae.name, sae.hook_point, sae.target, sae_digest(sae.sae)]) for sae in given.saes
    }


@dataclass(frozen=True)
class KeptLatents:
    """The firings of an SAE's latents, read from the file of an interrupted evaluation."""

    firings: Int64[np.ndarray, " d_sae"]


def judge_offline(given: Prepared, results: Results) -> dict[str, Fired]:
    """Compute the offline metrics in one pass over the held-out rows; return every SAE's latent firings by name."""
    config = given.config
    fired: dict[str, Fired] = {}
    for sae in results.saes:
        if (kept := _kept_latents(results, sae)) is not None:
            fired[sae.name] = kept
    waiting = results.waiting("offline", only=fired)
    if not waiting:
        return fired
    inputs, sums = accumulate(waiting, given.rows, config.block_rows, given.device)
    for sae in waiting:
        reason = _not_finite(sae, inputs[sae.target], sums[sae.name])
        if reason is not None:
            results.fail(sae.name, reason)
            continue
        measured, intervals = offline_metrics(inputs[sae.target], sums[sae.name], config.bootstrap_samples, config.seed)
        found: dict[str, Any] = provenance(given.rows, given.model_name) | measured
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
        results.note(sae.name, FIRINGS, _firings_digest(latents.firings))
        write_latents(results.output, results.files[sae.name], latents, columns | norm_share_columns(sae))
        results.add("offline", sae.name, found)
    return fired


def _kept_latents(results: Results, sae: EvaluatedSae) -> KeptLatents | None:
    """Return the firings that an interrupted evaluation wrote for an SAE; None if they are missing or changed."""
    noted = results.noted(sae.name, FIRINGS)
    if noted is None:
        return None
    try:
        table = pq.read_table(latents_path(results.output, results.files[sae.name]), columns=["firings"])
    except (OSError, ValueError):  # includes Arrow's errors
        return None
    firings = table["firings"].to_numpy()
    return KeptLatents(firings) if _firings_digest(firings) == noted else None


def _firings_digest(firings: np.ndarray) -> str:
    return digest_of("firings", [torch.tensor(firings)])


def _not_finite(sae: EvaluatedSae, inputs: InputSums, sums: SaeSums) -> str | None:
    """Return why an SAE's metrics would not be finite; None if they are finite."""
    if not all(np.isfinite(values).all() for values in inputs.sums().values()):
        return f"the store's rows at '{sae.target}' are not finite; check it with `thresher store verify`"
    if not all(np.isfinite(values).all() for values in sums.reconstruction.sums().values()):
        return "its latents or reconstructions of held-out rows are NaN or infinite; train it again, or leave it out"
    return None


def judge_in_model(given: Prepared, results: Results) -> None:
    """Run the model with every SAE spliced in and compute the losses.

    Raises:
        NonFiniteError: the model's own predictions are not finite.
    """
    if given.model is None:
        return
    config, waiting = given.config, results.waiting("model")
    if not waiting:
        return
    part = given.rows.subset(config.model_rows)
    losses = accumulate_losses(given.model, given.hook_points, waiting, part, config.batch_size)
    for sae in waiting:
        targets = sae.spliced_at
        if not targets:
            results.add("model", sae.name, {})
            continue
        first = losses[run_name(sae, targets[0])]
        if not np.isfinite(first["ce_clean"]).all():
            raise NonFiniteError(
                f"the predictions of '{given.model_name}' on the stored tokens are NaN or infinite; its data type is "
                f'{given.model.dtype}: try model_dtype = "float32"'
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


def probe(given: Prepared, results: Results) -> None:
    """Probe every SAE's latents for the next token; does nothing without probe tasks."""
    if not given.tasks:
        return
    waiting = results.waiting("probes")
    if waiting:
        found = sparse_probing(waiting, given.rows.subset(given.config.model_rows), given.config, given.tasks)
        for name, values in found.items():
            results.add("probes", name, values)


def index_features(given: Prepared, results: Results) -> dict[str, FeatureIndex] | None:
    """Build the feature index of every SAE; None if it is switched off or the store holds no tokens."""
    if not given.has_features:
        return None
    settings = FeatureSettings(max_rows=given.config.feature_rows)
    return build_feature_index(
        given.store,
        results.saes,
        results.output / "features",
        model=given.model,
        tokenizer=given.tokenizer,
        settings=settings,
        on_failure=results.fail,
    )
