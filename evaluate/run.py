"""Judge SAEs: held-out rows of the store, then the model with each SAE spliced in, then the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..shared.config import to_toml
from ..shared.device import choose_device
from ..shared.store import ActivationStore
from .across_places import across_places, place_columns
from .bootstrap import confidence_intervals, estimate
from .comparison import compare_dictionaries
from .config import EvaluateConfig
from .dictionary import geometry
from .features.build import FeatureSettings, build_feature_index
from .features.export import export_indexes
from .features.files import FeatureIndex
from .held_out import held_out
from .offline import accumulate, offline_metrics
from .output import loss_curve, write_atomically, write_latents, write_metrics, write_rows
from .probing import sparse_probing
from .provenance import footer, logit_effects_note, provenance, report_title
from .refusals import refuse
from .report.write import write_report
from .sae_folders import EvaluatedSae, load_saes, sae_folders
from .same_model import check_vocabulary
from .spliced import accumulate_losses, splice_metrics
from .store_model import model_name, open_model, open_tokenizer, splice_points
from .table import metrics_table


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluate every SAE on the store's held-out contexts; write and return the metrics.

    Raises:
        ConfigError: the settings contradict each other.
        MissingFileError: the store or an SAE is not there.
        StoreError: the store is damaged or holds nothing out.
        HookPointError, SaeError: an SAE does not fit the store.
        ModelError: the model cannot be loaded, has no logits, or does not fit the store.
    """
    device = choose_device(config.device)
    store = ActivationStore.open(config.store, cache=config.cache, cache_bytes=config.cache_bytes, roles=config.roles)
    refuse(config, store)
    saes = load_saes(sae_folders(config.saes), store, device)
    rows = held_out(store, config.max_rows)
    model = model_name(config, store)
    language_model = open_model(config, store, device)
    hook_points = splice_points(language_model, saes, store) if language_model is not None else {}
    tokenizer = open_tokenizer(config, store) if store.has_tokens and config.feature_rows else None
    if language_model is not None and isinstance(config.model, str):
        check_vocabulary(rows, config.model, language_model, config.cache)
    output = Path(config.output)

    inputs, sums = accumulate(saes, rows, config.block_rows, device)
    losses = {}
    if language_model is not None:
        part = rows.subset(config.model_rows)
        losses = accumulate_losses(language_model, hook_points, saes, part, config.batch_size)
    probes = sparse_probing(saes, rows.subset(config.model_rows), config)
    metrics = []
    for sae in saes:
        row = sae.description() | provenance(rows, model)
        measured, intervals = offline_metrics(inputs[sae.target], sums[sae.name], config.bootstrap_samples, config.seed)
        row |= measured
        row |= across_places(sae, inputs, sums[sae.name], losses)
        if sae.name in losses:
            row |= estimate(splice_metrics, losses[sae.name])
            row["n_model_tokens"] = int(losses[sae.name]["n_kl"].sum())
            row["n_predictions"] = int(losses[sae.name]["n_ce"].sum())
            intervals |= confidence_intervals(splice_metrics, losses[sae.name], config.bootstrap_samples, config.seed)
        row["confidence_95"] = {name: list(bounds) for name, bounds in intervals.items()} or None
        columns = {}
        if config.dictionary:
            columns, summary = geometry(sae.sae, sums[sae.name].latents.firings, config.n_neighbours)
            row |= summary
        columns |= place_columns(sae)
        write_latents(output, sae.name, sums[sae.name].latents, columns)
        metrics.append(row | probes.get(sae.name, {}))

    write_metrics(output, metrics)
    if config.dictionary:
        pairs = compare_dictionaries(saes, {name: sum_.latents for name, sum_ in sums.items()})
        write_rows(output / "dictionaries.parquet", pairs)
    write_atomically(output / "config.toml", to_toml(config).encode())
    curves = {sae.name: loss_curve(sae.path) for sae in saes}
    features = _features(config, store, saes, language_model, tokenizer, output / "features")
    title, facts = report_title(rows, model), provenance(rows, model) | logit_effects_note(features)
    report = write_report(output / "report.html", metrics, curves, features, title=title, provenance=facts)
    tqdm.write(metrics_table(metrics))
    tqdm.write(f"\n{footer(rows, model, losses)}\nreport  {report}")
    if config.export and features:
        dataset = str(store.metadata.get("dataset") or "")
        export_indexes(features, output / "neuronpedia", model, dataset)
        tqdm.write(f"export  {output / 'neuronpedia'}")
    return metrics


def _features(
    config: EvaluateConfig,
    store: ActivationStore,
    saes: list[EvaluatedSae],
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path,
) -> dict[str, FeatureIndex] | None:
    """Build the feature index, where one is asked for and the store has the tokens that it shows."""
    if config.feature_rows == 0 or not store.has_tokens:
        return None
    settings = FeatureSettings(max_rows=config.feature_rows)
    return build_feature_index(store, saes, output, model=model, tokenizer=tokenizer, settings=settings)
