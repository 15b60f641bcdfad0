"""Estimate the bytes and the time of a harvest, and check that they fit on the disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..shared.core.errors import DiskSpaceError
from ..shared.core.location import cache_folder, locate
from ..shared.store.format.layout import bytes_per_value
from .config import HarvestConfig

_log = logging.getLogger(__name__)

# Stored bytes over raw bytes, with a margin: bitshuffled bfloat16 activations compress to 0.70 to 0.78.
STORED_FRACTION = {"none": 1.0, "lz4": 0.85, "zstd": 0.85, "int8": 1.0}
TOKEN_BYTES = 4 + 8
STAGED_SHARDS = 4
"""Shards of each hook point that are in the cache at once while they are uploaded."""


def report_estimate(config: HarvestConfig, widths: Mapping[str, int], n_contexts: int, rows_per_second: float) -> None:
    """Print the estimate of the rest of the harvest; raise `DiskSpaceError` if it does not fit on the disk."""
    n_rows = n_contexts * config.context_size
    needed = estimate(widths, config.dtype, config.codec, n_rows, rows_per_second)
    store = locate(config.store)
    if isinstance(store, Path):
        print_estimate(needed, len(widths), check_disk(store, needed))
    else:
        staged = min(needed.stored_bytes, STAGED_SHARDS * len(widths) * config.shard_bytes)
        print_estimate(
            needed, len(widths), check_disk(cache_folder(config.cache), replace(needed, stored_bytes=staged))
        )


@dataclass(frozen=True)
class Estimate:
    """The rows, bytes and seconds that remain."""

    n_rows: int
    raw_bytes: int
    stored_bytes: int
    seconds: float


def estimate(widths: Mapping[str, int], dtype: str, codec: str, n_rows: int, rows_per_second: float) -> Estimate:
    """Estimate a harvest from its shape and the speed of its first batch."""
    raw_bytes = n_rows * sum(widths.values()) * bytes_per_value(dtype, codec)
    stored = raw_bytes * STORED_FRACTION[codec] + n_rows * TOKEN_BYTES
    return Estimate(n_rows, raw_bytes, int(stored), n_rows / rows_per_second)


def check_disk(store: Path, needed: Estimate) -> int:
    """Return the free bytes of the store's disk; raise `DiskSpaceError` if the harvest does not fit."""
    folder = store.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed.stored_bytes:
        raise DiskSpaceError(
            f"the harvest needs about {human_bytes(needed.stored_bytes)} in '{store}', its disk has "
            f"{human_bytes(free)} free; make room, lower tokens, or name a store on another disk"
        )
    return free


def print_estimate(needed: Estimate, n_hook_points: int, free: int) -> None:
    """Print the estimate."""
    _log.info(
        f"harvest: {needed.n_rows:,} rows at {n_hook_points} hook point{'s' * (n_hook_points > 1)}, "
        f"about {human_bytes(needed.stored_bytes)} ({human_bytes(needed.raw_bytes)} raw; {human_bytes(free)} free), "
        f"about {human_seconds(needed.seconds)} at {needed.n_rows / needed.seconds:,.0f} tokens/s"
    )


def human_bytes(n_bytes: float) -> str:
    """Return a size with a suitable decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def human_seconds(seconds: float) -> str:
    """Return a duration with a suitable unit."""
    for unit, size in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < size:
            return f"{seconds:.0f} {unit}" if unit == "s" else f"{seconds:.1f} {unit}"
        seconds /= size if unit != "h" else 24
    return f"{seconds:.1f} days"
