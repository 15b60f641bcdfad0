"""The explanations of an SAE on disk: one Parquet file beside its feature index, one line per latent and explainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...shared.core.disk import replacing
from ..features.files import FeatureIndex
from .scores import CAUSAL, EXACT, SCORES

_METADATA_KEY = b"thresher.explanations"
RULES = "rules"
TOKEN_FREQUENCY, RANDOM_LATENT = "token frequency", "random latent"
BASELINES = (TOKEN_FREQUENCY, RANDOM_LATENT)
"""Explainers that the others are compared with; those that a language model judges have its name added."""
SCORED = (*SCORES, *EXACT, *CAUSAL)
_COUNTED = ("n_answers", "n_bad_answers")
_SCHEMA = pa.schema(
    {
        "latent": pa.int64(),
        "explanation": pa.string(),
        "explainer": pa.string(),
        "is_baseline": pa.bool_(),
        **{f"{score}{end}": pa.float32() for score in SCORED for end in ("", "_low", "_high")},
        "n_active": pa.int32(),
        "n_inactive": pa.int32(),
        "prompts": pa.string(),
        "n_answers": pa.int32(),
        "n_bad_answers": pa.int32(),
    }
)


class Explained(NamedTuple):
    """What one explainer says of several latents, and the scores by column.

    If a language model explained or judged, `prompts` is the hash of the prompts, and the last two count its answers
    and those that were of no use.
    """

    explainer: str
    latents: np.ndarray
    explanations: Sequence[str]
    scores: Mapping[str, np.ndarray]
    n_active: np.ndarray
    n_inactive: np.ndarray
    prompts: str = ""
    n_answers: np.ndarray | None = None
    n_bad_answers: np.ndarray | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether this is only to compare others with."""
        return self.explainer.startswith(BASELINES)


def explanations_path(index: FeatureIndex) -> Path:
    """Return where the explanations of an index's latents are: `explanations/NAME.parquet` beside `features/`."""
    return index.path.parent.parent / "explanations" / index.path.name


def write_explanations(path: Path, parts: Sequence[Explained], metadata: Mapping[str, Any]) -> None:
    """Write the explanations by latent, for each latent those of all explainers."""
    tables = []
    for part in parts:
        columns: dict[str, Any] = {name: pa.nulls(len(part.latents)) for name in _SCHEMA.names}
        columns |= {name: pa.array(values, from_pandas=True) for name, values in part.scores.items() if name in columns}
        columns |= {
            "latent": part.latents,
            "explanation": pa.array(list(part.explanations), pa.string()),
            "explainer": pa.array([part.explainer] * len(part.latents)),
            "is_baseline": pa.array([part.is_baseline] * len(part.latents)),
            "n_active": part.n_active,
            "n_inactive": part.n_inactive,
            **{name: pa.array(values) for name in _COUNTED if (values := getattr(part, name)) is not None},
            "prompts": pa.array([part.prompts or None] * len(part.latents), pa.string()),
        }
        tables.append(
            pa.table([pa.array(columns[name]).cast(_SCHEMA.field(name).type) for name in _SCHEMA.names], _SCHEMA)
        )
    table = pa.concat_tables(tables)
    order = np.argsort(table["latent"].to_numpy(), kind="stable")
    described = {_METADATA_KEY: json.dumps(dict(metadata), ensure_ascii=False).encode()}
    with replacing(path) as unfinished:
        pq.write_table(table.take(order).replace_schema_metadata(described), unfinished, compression="zstd")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what a file of explanations says of itself; nothing if there is none, or none that can be read."""
    try:
        return dict(json.loads((pq.read_schema(path).metadata or {})[_METADATA_KEY]))
    except (OSError, KeyError, ValueError):  # includes Arrow's errors
        return {}


def are_of_index(index: FeatureIndex) -> bool:
    """Return whether the explanations beside an index were made for it, and not for an earlier one."""
    return read_metadata(explanations_path(index)).get("index") == index.metadata.get("fingerprint")


def read_explanations(index: FeatureIndex) -> dict[int, list[dict[str, Any]]]:
    """Return the explanations of an index's latents by latent; none if they were made for another index."""
    if not are_of_index(index):
        return {}
    found: dict[int, list[dict[str, Any]]] = {}
    for line in pq.read_table(explanations_path(index)).to_pylist():
        found.setdefault(line["latent"], []).append(line)
    return found


def mean_scores(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean of each score over the latents that have it."""
    means = {}
    for name in SCORED:
        values = np.asarray(scores.get(name, np.zeros(0)), dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            means[name] = float(values.mean())
    return means
