"""Compare our reader with zarr-python and tensorstore at reading chunks in random order, on the same files.

    python benchmarks/store_read.py [--store runs/demo/store] [--rows 524288]

Real activations are copied from a store into one store per codec. Every reader decodes the same chunks in the same
random order into bfloat16 rows; the rows are compared before a speed is printed. Rounds alternate, and each reader's
best round counts. Ours is timed with every checksum verified, as the others do, and without verification, which is the
cost of a second epoch with `verify="first"`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore
import torch
import zarr

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.bfloat16 import register_bfloat16

HOOK_POINT = "rows"
AT_ONCE = 64


def copy_rows(source: ActivationStore, rows: int, codec: str, path: Path, shard_bytes: int) -> ActivationStore:
    """Write the first rows of a source's last hook point to a new store."""
    hook_point = source.hook_points[-1]
    context = source.context_size
    settings = {"codec": codec, "shard_bytes": shard_bytes}
    with ActivationStoreWriter(path, {HOOK_POINT: source.d_in(hook_point)}, context, **settings) as writer:
        for start in range(0, rows, 32 * context):
            stop = min(rows, start + 32 * context)
            writer.append({HOOK_POINT: source.read(hook_point, start, stop).unflatten(0, (-1, context))})
    return ActivationStore.open(path)


def ours(path: Path, verify: str) -> Callable[[np.ndarray, torch.Tensor], None]:
    """Return our reader of chunks into `out`."""
    store = ActivationStore.open(path, verify=verify)  # pyright: ignore[reportArgumentType]
    return lambda chunks, out: _discard(store.read_chunks(HOOK_POINT, chunks, out))


def by_zarr(path: Path) -> Callable[[np.ndarray, torch.Tensor], None]:
    """Return zarr-python's reader, which requests the chunks of a call together."""
    from zarr.core.sync import sync

    array = zarr.open_array(path / HOOK_POINT, mode="r")
    rows = array.chunks[0]

    def read(chunks: np.ndarray, out: torch.Tensor) -> None:
        target = out.view(torch.int16).numpy().reshape(len(chunks), rows, -1)

        async def one(i: int, chunk: int) -> None:
            part = await array.async_array.getitem((slice(chunk * rows, (chunk + 1) * rows),))
            target[i] = np.asarray(part).view(np.int16)

        async def every() -> None:
            await asyncio.gather(*(one(i, int(chunk)) for i, chunk in enumerate(chunks)))

        sync(every())

    return read


def by_tensorstore(path: Path) -> Callable[[np.ndarray, torch.Tensor], None]:
    """Return tensorstore's reader, which requests the chunks of a call together."""
    context = {"data_copy_concurrency": {"limit": os.cpu_count() or 1}, "cache_pool": {"total_bytes_limit": 16 << 20}}
    spec = {"driver": "zarr3", "kvstore": f"file://{path.resolve()}/{HOOK_POINT}", "context": context}
    array = tensorstore.open(spec).result()
    rows = array.chunk_layout.read_chunk.shape[0]

    def read(chunks: np.ndarray, out: torch.Tensor) -> None:
        target = out.view(torch.int16).numpy().reshape(len(chunks), rows, -1)
        futures = [array[int(chunk) * rows : (int(chunk) + 1) * rows].read() for chunk in chunks]
        for i, future in enumerate(futures):
            target[i] = future.result().view(np.int16)

    return read


def _discard(_: object) -> None:
    pass


def pass_over(read: Callable[[np.ndarray, torch.Tensor], None], order: np.ndarray, out: torch.Tensor) -> float:
    """Read all chunks in order, `AT_ONCE` per call; return the seconds."""
    rows = len(out) // AT_ONCE
    start = time.perf_counter()
    for i in range(0, len(order), AT_ONCE):
        part = order[i : i + AT_ONCE]
        read(part, out[: len(part) * rows])
    return time.perf_counter() - start


def measure(store: ActivationStore, rounds: int) -> dict[str, float]:
    """Check that all readers return equal rows, and return the best MB/s of raw data of each."""
    path = store.path
    readers = {
        "ours": ours(path, "always"),
        "ours, second epoch": ours(path, "never"),
        "zarr-python": by_zarr(path),
        "tensorstore": by_tensorstore(path),
    }
    order = np.random.default_rng(0).permutation(store.n_chunks)
    d_in = store.d_in(HOOK_POINT)
    out = torch.empty(AT_ONCE * store.chunk_rows, d_in, dtype=store.dtype)
    expected = torch.empty_like(out)
    for name, read in readers.items():
        for i in range(0, len(order), AT_ONCE):
            part = order[i : i + AT_ONCE]
            n = len(part) * store.chunk_rows
            readers["ours"](part, expected[:n])
            read(part, out[:n])
            if not torch.equal(out[:n].view(torch.int16), expected[:n].view(torch.int16)):
                raise SystemExit(f"{name} gives other rows than ours: no speed is printed")
    best = dict.fromkeys(readers, float("inf"))
    for _ in range(rounds):
        for name, read in readers.items():
            best[name] = min(best[name], pass_over(read, order, out))
    raw = store.n_chunks * store.chunk_rows * d_in * 2
    return {name: raw / seconds / 1e6 for name, seconds in best.items()}


def main() -> None:
    """Measure every codec; print a table and write runs/bench/store_read.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--rows", type=int, default=524_288)
    parser.add_argument("--shard-bytes", type=int, default=32 << 20)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    register_bfloat16()
    source = ActivationStore.open(arguments.store)
    rows = min(arguments.rows, source.n_rows) // source.context_size * source.context_size
    found: dict[str, dict[str, float]] = {}
    print("codec  ratio    ours  2nd epoch   zarr  tensorstore (MB/s)   ours/zarr  2nd/zarr  ours/ts  2nd/ts")
    with tempfile.TemporaryDirectory() as folder:
        for codec in ("none", "lz4", "zstd"):
            store = copy_rows(source, rows, codec, Path(folder) / codec, arguments.shard_bytes)
            speeds = measure(store, arguments.rounds)
            stored = sum(f.bytes for r in store.manifest.shards for k, f in r.files.items() if k.startswith(HOOK_POINT))
            first, second = speeds["ours"], speeds["ours, second epoch"]
            found[codec] = {
                **{f"{name} MB/s": round(speed, 1) for name, speed in speeds.items()},
                "stored / raw": round(stored / (rows * store.d_in(HOOK_POINT) * 2), 4),
                "ours / zarr-python": round(first / speeds["zarr-python"], 2),
                "ours / tensorstore": round(first / speeds["tensorstore"], 2),
                "ours, second epoch / zarr-python": round(second / speeds["zarr-python"], 2),
                "ours, second epoch / tensorstore": round(second / speeds["tensorstore"], 2),
            }
            line = found[codec]
            print(
                f"{codec:<6} {line['stored / raw']:.3f} {first:>7,.0f} {second:>10,.0f} {speeds['zarr-python']:>6,.0f} "
                f"{speeds['tensorstore']:>12,.0f}          {line['ours / zarr-python']:>8.2f} "
                f"{line['ours, second epoch / zarr-python']:>9.2f} {line['ours / tensorstore']:>8.2f} "
                f"{line['ours, second epoch / tensorstore']:>7.2f}",
                flush=True,
            )
    target = Path("runs/bench/store_read.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"rows": rows, "cpus": os.cpu_count(), "codecs": found}, indent=2) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
