"""Compare the speed of shuffled batches with a plain copy of the same number of bytes in memory.

    .venv/bin/python benchmarks/train_stream.py [--store runs/demo/store] [--widths 256 4096] [--megabytes 512]

Real rows are copied from a store into raw stores of each width (wide rows are several rows, concatenated). Batches are
taken over whole epochs after the first, which fills the page cache, and are not used. The plain copy is `np.copyto` of
the same number of bytes with the same number of threads. Rounds alternate, and medians count: of wall-clock speeds, and
of CPU seconds, which are steadier on a busy machine. Before a speed is printed, every row is checked to occur once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.train import ShuffledBatches

CONTEXT = 256


def raw_store(source: ActivationStore, width: int, n_bytes: int, codec: str, path: Path) -> ActivationStore:
    """Write rows of a source's last hook point, concatenated to the given width, to a new store."""
    hook_point = source.hook_points[-1]
    side = max(1, width // source.d_in(hook_point))
    n_contexts = min(n_bytes // (width * 2), source.n_rows // side) // CONTEXT
    with ActivationStoreWriter(path, {"rows": width}, CONTEXT, codec=codec) as writer:
        for context in range(n_contexts):
            start = context * CONTEXT * side
            rows = source.read(hook_point, start, start + CONTEXT * side)
            writer.append({"rows": rows.reshape(1, CONTEXT, -1)[..., :width]})
    return ActivationStore.open(path)


def check(store: ActivationStore, batch_size: int, window_bytes: int) -> None:
    """Stop unless an epoch's rows, sorted by their bytes, are the store's rows."""
    with ShuffledBatches(store, ["rows"], batch_size, window_bytes=window_bytes) as batches:
        seen = torch.cat([next(batches)["rows"][:, 0] for _ in range(-(-batches.rows_per_epoch // batch_size))])
        n = batches.rows_per_epoch
    stored = store.read("rows", 0, store.n_rows)[:, 0]
    if not torch.equal(seen[:n].view(torch.int16).sort().values, stored.view(torch.int16).sort().values):
        raise SystemExit("the stream does not give every row once: no speed is printed")


def stream_seconds(batches: ShuffledBatches, n_batches: int) -> tuple[float, float]:
    """Take an epoch of batches; return the wall-clock and CPU seconds.

    Decoding ahead is finished before the start and again at the end, so that exactly an epoch's work is measured.
    """
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(n_batches):
        next(batches)
    for window in batches._windows.values():
        window.result()
    return time.perf_counter() - clock, time.process_time() - cpu


def copy_seconds(
    source: np.ndarray, target: np.ndarray, n_bytes: int, pool: ThreadPoolExecutor, threads: int
) -> tuple[float, float]:
    """Copy a buffer, one part per thread; return the wall-clock and CPU seconds for `n_bytes`."""
    parts = [slice(len(source) * i // threads, len(source) * (i + 1) // threads) for i in range(threads)]
    clock, cpu = time.perf_counter(), time.process_time()
    list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
    share = n_bytes / source.nbytes
    return (time.perf_counter() - clock) * share, (time.process_time() - cpu) * share


def main() -> None:
    """Print one JSON object per width and codec; write runs/bench/train_stream.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--codecs", nargs="+", default=["none"])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--window-bytes", type=int, default=2 << 30)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    source = ActivationStore.open(options.store)
    found = []
    with ThreadPoolExecutor(options.threads) as pool, tempfile.TemporaryDirectory() as folder:
        for width in options.widths:
            for codec in options.codecs:
                path = Path(folder) / f"{width}-{codec}"
                store = raw_store(source, width, options.megabytes << 20, codec, path)
                check(store, options.batch_size, options.window_bytes)
                memory = np.ones(store.n_rows * width * 2, dtype=np.uint8)
                target = np.ones_like(memory)
                ratios, speeds, cpu_ratios = [], [], []
                with ShuffledBatches(store, ["rows"], options.batch_size, window_bytes=options.window_bytes) as batches:
                    n_batches = batches.rows_per_epoch // options.batch_size
                    n_bytes = n_batches * options.batch_size * width * 2
                    stream_seconds(batches, n_batches)
                    for _ in range(options.rounds):
                        seconds, cpu = stream_seconds(batches, n_batches)
                        copy, copy_cpu = copy_seconds(memory, target, n_bytes, pool, options.threads)
                        ratios.append(copy / seconds)
                        cpu_ratios.append(copy_cpu / cpu)
                        speeds.append(n_bytes / seconds / 1e6)
                found.append(
                    {
                        "width": width,
                        "codec": codec,
                        "MB/s": round(statistics.median(speeds)),
                        "of a plain copy": round(statistics.median(ratios), 3),
                        "of a plain copy, by CPU seconds": round(statistics.median(cpu_ratios), 3),
                    }
                )
                print(json.dumps(found[-1]), flush=True)
    out = Path("runs/bench/train_stream.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"threads": options.threads, "megabytes": options.megabytes, "rows": found}, indent=2) + "\n"
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
