"""Write the result files, each one atomically."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...shared.core.disk import write_file
from ..metrics.latent_sums import LatentSums


def write_metrics(output: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write `metrics.json` and `metrics.parquet`: the same rows, one per SAE; NaN and infinity become null."""
    rows = finite(_with_all_keys(metrics))
    write_json(output / "metrics.json", rows)
    write_rows(output / "metrics.parquet", rows)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(path, text.encode())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, whose keys may differ, as a Parquet table."""
    write_file(path, parquet_bytes(pa.Table.from_pylist(_with_all_keys(rows))))


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, with None, also in nested lists and mappings."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_all_keys(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def write_table(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns as a Parquet table."""
    write_file(path, parquet_bytes(pa.table(dict(columns))))


def latents_path(output: Path, file_name: str) -> Path:
    """Return the path of an SAE's `latents` file."""
    return output / "latents" / f"{file_name}.parquet"


def write_latents(output: Path, file_name: str, sums: LatentSums, columns: Mapping[str, np.ndarray]) -> None:
    """Write `latents/NAME.parquet`, one row per latent."""
    write_file(latents_path(output, file_name), parquet_bytes(latent_table(sums, columns)))


def latent_table(sums: LatentSums, geometry: Mapping[str, np.ndarray]) -> pa.Table:
    """Return a table with one row per latent: its firing statistics and the columns of `geometry`.

    A column of `geometry` with several values per latent becomes a list column.
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


def loss_curve(sae_folder: Path) -> list[dict[str, Any]]:
    """Read the `metrics.jsonl` that training wrote beside an SAE, without damaged lines; empty if it does not exist."""
    try:
        lines = (sae_folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    read = (_line(line) for line in lines)
    return [line for line in read if line is not None]


def _line(text: bytes) -> dict[str, Any] | None:
    """Parse a logged line; return None if it is cut off or damaged."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
