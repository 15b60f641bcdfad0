"""Export a feature index as the JSON batches that SAEDashboard writes and Neuronpedia imports.

The fields are those of `NeuronpediaDashboardBatch` in SAEDashboard (`batch-0.json`, ...). Fields that the index has no
data for (alignment with neurons, the histogram over all logits) are empty lists.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...shared.core.disk import write_file, writing
from ...shared.core.paths import user_path
from ...shared.model.hook_points import canonical_hook_point
from ..saes.names import file_names
from .files import FeatureIndex

BATCH_LATENTS = 128
N_INTERVALS = 5
EXPORTED_SCORES = ("detection", "fuzzing", "simulation", "intruder")
EMPTY_FIELDS = (
    "neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices "
    "correlated_neurons_l1 correlated_neurons_pearson logits_hist_data_bar_heights logits_hist_data_bar_values "
    "decoder_weights_dist"
)


def export_indexes(
    indexes: Mapping[str, FeatureIndex],
    output: Path,
    model: str | None,
    dataset: str,
    explanations: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]] | None = None,
) -> list[Path]:
    """Export every index to `<output>/<name>/`, labelled with the model's name, the layer and the SAE's name.

    `explanations` are lines of each SAE's `explanations/NAME.parquet`, by latent.
    """
    folders, files = [], file_names(indexes)
    for name, index in indexes.items():
        folders.append(output / files[name])
        model_id = Path(model or "model").name
        layer = layer_number(str(index.metadata["hook_point"]))
        export_neuronpedia(index, folders[-1], model_id=model_id, layer=layer, sae_set=name, dataset=dataset)
        found = (explanations or {}).get(name, {})
        _export_explanations(found, folders[-1] / "explanations", model_id, f"{layer}-{name}")
    return folders


def _export_explanations(
    explanations: Mapping[int, Sequence[Mapping[str, Any]]], output: Path, model_id: str, source: str
) -> None:
    """Write `batch-0.jsonl.gz`, one explanation per line, in the fields of Neuronpedia's own export.

    Baselines, which only say what a score is worth, are left out. Without explanations no file is left.
    """
    path = output / "batch-0.jsonl.gz"
    lines = [
        {
            "modelId": model_id,
            "layer": source,
            "index": str(latent),
            "description": line["explanation"],
            "explanationModelName": line["explainer"],
            "typeName": "thresher",
            "scores": {name: round(line[name], 4) for name in EXPORTED_SCORES if line[name] is not None},
        }
        for latent, found in sorted(explanations.items())
        for line in found
        if not line["is_baseline"]
    ]
    if not lines:
        with writing(path):
            path.unlink(missing_ok=True)
        return
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_file(path, gzip.compress(text.encode(), mtime=0))


def layer_number(hook_point: str) -> int:
    """Return the first number in a hook point's name, which is its layer; 0 if the name has no number."""
    numbers = [part for part in canonical_hook_point(hook_point).split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else 0


def export_neuronpedia(
    index: FeatureIndex, output: str | Path, *, model_id: str, layer: int, sae_set: str, dataset: str = ""
) -> list[Path]:
    """Write `<output>/batch-<n>.json` and `skipped_indexes.json`, which lists the latents that never fire."""
    output = user_path(output)
    density = index.columns(["density"])["density"].to_numpy()
    with writing(output):
        for earlier in output.glob("batch-*.json"):  # an earlier index may have had more batches
            earlier.unlink()
    written, skipped = [], []
    for number, lines in enumerate(index.batches(BATCH_LATENTS)):
        skipped += [line["latent"] for line in lines if not line["firings"]]
        features = [_feature(line, index, density, dataset) for line in lines if line["firings"]]
        batch = {"model_id": model_id, "layer": layer, "sae_set": sae_set, "features": features}
        written.append(_write(output / f"batch-{number}.json", batch))
    _write(
        output / "skipped_indexes.json",
        {"model_id": model_id, "layer": str(layer), "sae_set": sae_set, "skipped_indexes": skipped},
    )
    return written


def _feature(line: Mapping[str, Any], index: FeatureIndex, density: np.ndarray, dataset: str) -> dict[str, Any]:
    edges = np.linspace(0, line["histogram_end"], len(line["histogram"]) + 1)
    neighbours = [other["latent"] for other in line["neighbours"]]
    cosine = np.array([other["score"] for other in line["neighbours"]])
    context_size = int(index.metadata["context_size"])
    return {name: [] for name in EMPTY_FIELDS.split()} | {
        "feature_index": line["latent"],
        "correlated_features_indices": neighbours,
        "correlated_features_l1": _rounded(cosine),
        "correlated_features_pearson": _rounded(pearson(cosine, line["density"], density[neighbours])),
        "neg_str": [index.texts.alone(effect["token"]) for effect in line["suppressed"]],
        "neg_values": _rounded([effect["effect"] for effect in line["suppressed"]]),
        "pos_str": [index.texts.alone(effect["token"]) for effect in line["promoted"]],
        "pos_values": _rounded([effect["effect"] for effect in line["promoted"]]),
        "frac_nonzero": line["density"],
        "freq_hist_data_bar_values": _rounded((edges[1:] + edges[:-1]) / 2),
        "freq_hist_data_bar_heights": line["histogram"],
        "n_prompts_total": int(index.metadata["n_contexts"]),
        "n_tokens_in_prompt": context_size,
        "dataset": dataset,
        "activations": [
            *(_activation(entry, index, (-1.0, line["max_activation"], -1.0)) for entry in line["top"]),
            *(_activation(entry, index, _interval(entry["activation"], line)) for entry in line["sampled"]),
        ],
    }


def _activation(entry: Mapping[str, Any], index: FeatureIndex, interval: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "bin_min": interval[0],
        "bin_max": interval[1],
        "bin_contains": interval[2],
        "tokens": index.texts.in_context(entry["tokens"]),
        "values": _rounded(entry["activations"]),
    }


def _interval(activation: float, line: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the bounds of the fifth of [0, max] that contains an activation, and its share of the histogram."""
    width = line["max_activation"] / N_INTERVALS
    fifth = min(int(activation / width), N_INTERVALS - 1)
    counts = np.array(line["histogram"])
    centre = (np.arange(len(counts)) + 0.5) * line["histogram_end"] / len(counts)
    inside = counts[np.minimum(centre // width, N_INTERVALS - 1) == fifth].sum()
    low, high = round(fifth * width, 3), round((fifth + 1) * width, 3)
    return low, high, round(float(inside / max(counts.sum(), 1)), 4)


def pearson(cosine: np.ndarray, density: float, others: np.ndarray) -> np.ndarray:
    """Compute the Pearson correlation of two latents' firing indicators from their cosine and densities."""
    both = cosine * np.sqrt(density * others)
    deviation = np.sqrt(density * (1 - density) * others * (1 - others))
    return np.divide(both - density * others, deviation, out=np.zeros_like(both), where=deviation > 0)


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]


def _write(path: Path, value: Any) -> Path:
    write_file(path, json.dumps(value, ensure_ascii=False).encode())
    return path
