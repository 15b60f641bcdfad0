"""Write the results, each file whole or not at all."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .latents import LatentSums


def write_metrics(output: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write `metrics.json` and `metrics.parquet`: the same rows, one per SAE."""
    rows = _with_all_keys(metrics)
    text = json.dumps(rows, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(output / "metrics.json", text.encode())
    write_rows(output / "metrics.parquet", metrics)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, whose keys may differ, as a Parquet table."""
    write_atomically(path, parquet_bytes(pa.Table.from_pylist(_with_all_keys(rows))))


def _with_all_keys(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def write_latents(output: Path, name: str, sums: LatentSums, columns: Mapping[str, np.ndarray]) -> None:
    """Write `latents/NAME.parquet`, one row per latent."""
    path = output / "latents" / f"{name.replace('/', '_')}.parquet"
    write_atomically(path, parquet_bytes(latent_table(sums, columns)))


def latent_table(sums: LatentSums, geometry: Mapping[str, np.ndarray]) -> pa.Table:
    """Return one row per latent: how often and how strongly it fires, and where its directions point.

    A column of `geometry` that has several values per latent becomes a list column.
    """
    columns = {
        "latent": range(len(sums.firings)),
        "firings": sums.firings,
        "density": sums.density,
        "mean_activation": sums.mean_activation,
        "max_activation": sums.max_activation,
    }
    table = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    table |= {name: pa.array(list(values) if values.ndim > 1 else values) for name, values in geometry.items()}
    return pa.table(table)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def loss_curve(sae_folder: Path) -> list[dict[str, Any]]:
    """Read the `metrics.jsonl` that training left beside an SAE; empty where there is none."""
    file = sae_folder / "metrics.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
