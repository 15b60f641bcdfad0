"""Measure the trade-off of the chunk size: compression, reading speed and shuffle quality, on real activations.

    python benchmarks/store_chunks.py [--store runs/demo/store] [--rows 131072]

Compression and reading use the store's own code on the last hook point; reading is in random chunk order, in MB of raw
rows per CPU second. Shuffle quality is the design effect of a batch's mean: its variance relative to that of
independent rows, 1 + 2 rho (pairs of a batch's rows that share a group) / batch. Pairs are counted in the orders of
`thresher.train.stream.order`, and rho is measured on the store, for groups of rows that share a chunk and a context.
The result is for a large store of 4,096-wide rows in contexts of 1,024 with batches of 4,096: a window is a small part
of a billion rows, so it contains only one chunk of a context. (`benchmarks/train_shuffle.py` measures the design effect
of an existing store.)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.format.layout import choose_chunk_rows
from thresher.train.stream.order import place_window

BUDGETS_MIB = (2048, 512)
"""The default budget and a quarter of it; half holds the window, half the next one, which is being decoded."""
WIDE_ROW_BYTES, WIDE_CONTEXT, BATCH = 4096 * 2, 1024, 4096


def correlation(rows: torch.Tensor, usable: torch.Tensor, group: int) -> float:
    """Return the correlation of two usable rows in the same group of consecutive rows, by analysis of variance."""
    if group == 1:
        return 0.0
    n = len(rows) // group * group
    parts = zip(rows[:n].split(group), usable[:n].split(group), strict=True)
    groups = [part[mask].double() for part, mask in parts if mask.sum() > 1]
    within = float(torch.stack([part.var(0).sum() for part in groups]).mean())
    means = torch.stack([part.mean(0) for part in groups])
    share = float(torch.tensor([1 / len(part) for part in groups]).mean())
    between = max(0.0, float(means.var(0).sum()) - within * share)
    return between / (between + within)


def design_effect(chunk_rows: int, context: int, n_chunks: int, batch: int, rho: float) -> float:
    """Return the design effect of batches from one window of chunks with equal numbers of rows.

    Batches begin anywhere in a window, because windows of a real store are not a whole number of batches.
    """
    order = np.argsort(place_window(np.full(n_chunks, chunk_rows), seed=0, epoch=0, window=0))
    groups = order // min(chunk_rows, context)
    pairs = []
    for start in range(0, len(groups) - batch + 1, batch // 8):
        counts = np.unique(groups[start : start + batch], return_counts=True)[1]
        pairs.append(float((counts * (counts - 1) / 2).sum()))
    return 1 + 2 * rho * float(np.mean(pairs)) / batch


def write_and_read(rows: torch.Tensor, context: int, codec: str, chunk_bytes: int) -> tuple[int, float, float]:
    """Return (chunk rows, stored / raw, MB/s a CPU second) of a store of these rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        settings = {"codec": codec, "chunk_bytes": chunk_bytes}
        with ActivationStoreWriter(path, {"rows": rows.shape[1]}, context, **settings) as writer:
            writer.append({"rows": rows.unflatten(0, (-1, context))})
        store = ActivationStore.open(path)
        if not torch.equal(store.read("rows", 0, store.n_rows).view(torch.int16), rows.view(torch.int16)):
            raise SystemExit(f"{codec} does not give back what was written: no speed is printed")
        stored = sum(f.bytes for r in store.manifest.shards for k, f in r.files.items() if k.startswith("rows/"))
        order = np.random.default_rng(0).permutation(store.n_rows // store.chunk_rows)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            store.read_chunks("rows", order)
            best = min(best, time.process_time() - start)
        n_bytes = len(order) * store.chunk_rows * rows.shape[1] * 2
        return store.chunk_rows, stored / (rows.numel() * 2), n_bytes / 1e6 / best


def main() -> None:
    """Measure every chunk size; print a table and write runs/bench/store_chunks.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--rows", type=int, default=131_072)
    arguments = parser.parse_args()
    source = ActivationStore.open(arguments.store)
    hook_point, context = source.hook_points[-1], source.context_size
    rows = source.read(hook_point, 0, min(arguments.rows, source.n_rows) // context * context).clone()
    usable = torch.from_numpy(source.row_mask(0, len(rows)))
    found = []
    print(f"{hook_point}; correlation of rows of one context {correlation(rows, usable, context):.4f}")
    budgets = "".join(f"{f'at {mib} MiB':>15}" for mib in BUDGETS_MIB)
    print(f"chunk KiB   lz4: of raw  MB/s   zstd: of raw  MB/s   rows   rows wide{budgets}   (design effect)")
    for kib in (16, 32, 64, 128, 256, 512, 1024, 2048):
        line: dict[str, float] = {"chunk KiB": kib}
        for codec in ("lz4", "zstd"):
            chunk_rows, line[f"{codec} of raw"], line[f"{codec} MB/s"] = write_and_read(rows, context, codec, kib << 10)
        line["rows"] = chunk_rows
        line["rows wide"] = wide_rows = choose_chunk_rows(WIDE_ROW_BYTES, WIDE_CONTEXT, kib << 10)
        rho = correlation(rows, usable, min(wide_rows, context))
        for mib in BUDGETS_MIB:
            n_chunks = max(1, (mib << 20) // 2 // (wide_rows * WIDE_ROW_BYTES))
            line[f"design effect, {mib} MiB"] = design_effect(wide_rows, WIDE_CONTEXT, n_chunks, BATCH, rho)
        found.append({key: round(value, 4) for key, value in line.items()})
        effects = "".join(f"{line[f'design effect, {mib} MiB']:>15.3f}" for mib in BUDGETS_MIB)
        print(
            f"{kib:>9} {line['lz4 of raw']:>13.3f} {line['lz4 MB/s']:>6,.0f} {line['zstd of raw']:>13.3f} "
            f"{line['zstd MB/s']:>6,.0f} {chunk_rows:>6,} {wide_rows:>11,}{effects}",
            flush=True,
        )
    target = Path("runs/bench/store_chunks.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"rows": len(rows), "hook point": hook_point, "chunks": found}, indent=2) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
