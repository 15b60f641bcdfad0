"""Measure what a store of a billion rows costs before a row is read: its manifest, its statistics and its order.

    python benchmarks/store_at_scale.py [--rows 1_000_000_000] [--width 4096] [--hook-points 4]

Makes the manifest and the statistics that such a store would have, in memory, and parses and orders them with the
reader's own functions. Prints CPU seconds and the growth of the process's memory. No activations are made.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from thresher.shared.store.format.layout import CHUNK_BYTES, SHARD_BYTES, make_header, shard_keys
from thresher.shared.store.format.manifest import FileRecord, ShardRecord, encode_line, parse_manifest
from thresher.shared.store.format.moments import Moments
from thresher.shared.store.format.statistics import Statistics, decode_statistics, encode_statistics, merge_statistics
from thresher.train.stream.order import order_epoch

CONTEXT, WINDOW_CHUNKS, SAMPLE = 1024, 4096, 100
_T = TypeVar("_T")


def resident() -> int:
    """Return the memory that this process holds, in bytes."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def measured(what: str, action: Callable[[], _T]) -> _T:
    """Print what an action costs, and return its result."""
    before, started = resident(), time.process_time()
    result = action()
    print(f"{what}: {time.process_time() - started:.2f} CPU s, {max(0, resident() - before) / 1e6:.0f} MB of memory")
    return result


def main(rows: int, width: int, n_hook_points: int) -> None:
    names = {f"blocks.{8 * i}.resid_post": width for i in range(n_hook_points)}
    header = make_header(
        names,
        CONTEXT,
        dtype="bfloat16",
        codec="lz4",
        codec_level=None,
        mask_token_ids=[0],
        metadata={},
        n_contexts=rows // CONTEXT,
        has_tokens=True,
        chunk_bytes=CHUNK_BYTES,
        shard_bytes=SHARD_BYTES,
    )
    n_contexts, per_shard = rows // CONTEXT, header.contexts_per_shard
    n_shards, n_chunks = -(-n_contexts // per_shard), -(-n_contexts * CONTEXT // header.chunk_rows)
    lines, checksum = [], 0
    line, checksum = encode_line(header, checksum)
    lines.append(line)
    for shard in range(n_shards):
        files = {key: FileRecord(200_000_000 + shard, shard) for key in shard_keys(header, shard)}
        contexts = min(per_shard, n_contexts - shard * per_shard)
        line, checksum = encode_line(ShardRecord(shard=shard, contexts=contexts, files=files), checksum)
        lines.append(line)
    content = b"".join(lines)
    n_files = n_shards * len(shard_keys(header, 0))
    print(f"{n_shards:,} shards, {n_files:,} files, {n_chunks:,} chunks of {header.chunk_rows} rows per hook point")
    print(f"activations: {rows * width * 2 * n_hook_points / 1e12:.1f} TB raw; manifest: {len(content) / 1e6:.1f} MB")
    manifest = measured("parse the manifest", lambda: parse_manifest(content))
    assert manifest is not None
    assert manifest.n_contexts == n_contexts

    rng = np.random.default_rng(0)

    def statistics(contexts: int) -> Statistics:
        chunks = -(-contexts * CONTEXT // header.chunk_rows)
        moments = {name: Moments(contexts * CONTEXT, rng.random(width), rng.random(width), 1.0) for name in names}
        return Statistics(moments, rng.random(contexts) < 0.05, np.full(chunks, header.chunk_rows))

    whole = encode_statistics(statistics(n_contexts))
    print(f"statistics of the complete store: {len(whole) / 1e6:.1f} MB")
    found = measured("read them", lambda: decode_statistics(whole, header, n_contexts))
    parts = [encode_statistics(statistics(per_shard)) for _ in range(SAMPLE)]
    print(
        f"statistics of the shards, which an unfinished store is opened from: {len(parts[0]) * n_shards / 1e9:.1f} GB"
    )
    started = time.process_time()
    merge_statistics((decode_statistics(part, header, per_shard) for part in parts), header)
    print(f"merge them: {(time.process_time() - started) / SAMPLE * n_shards:.0f} CPU s (from {SAMPLE} of them)")
    epoch = measured("order an epoch", lambda: order_epoch(found.training_rows, WINDOW_CHUNKS, 0, 0))
    assert np.array_equal(np.sort(epoch.chunks), np.arange(n_chunks))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 10**9), ("width", 4096), ("hook-points", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    main(options.rows, options.width, options.hook_points)
