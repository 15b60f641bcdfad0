"""Codecs on real activations: bytes, speeds and error of every codec, through the store's own code, in one run.

    python benchmarks/store_codecs.py [--store runs/demo/store] [--rows 65536]

Speeds are MB/s of raw bfloat16 rows in one thread, in that thread's CPU seconds, so that they hold on
a machine that others use. A codec that should be lossless and is not stops the run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.codecs import decode_chunk, encode_chunk
from thresher.shared.store.encode import encode_hook_chunk
from thresher.shared.store.format import Header, arrays_of
from thresher.shared.store.quantise import dequantise, quantise

ROUNDS = 3


def cpu_seconds(action) -> float:
    """Return the least CPU seconds of this thread that an action took."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        action()
        best = min(best, time.thread_time() - start)
    return best


def speeds(header: Header, rows: torch.Tensor) -> dict[str, float]:
    """Return a codec's encode and decode speed, and the writer's whole work for a chunk, moments included."""
    arrays = {array.name: array for array in arrays_of(header)}
    (name,) = header.hook_points
    array = arrays[name]
    bits = rows.view(torch.int16).numpy().view(np.uint16)
    chunks = [bits[i : i + header.chunk_rows].copy() for i in range(0, len(bits), header.chunk_rows)]
    values = [chunk.view(np.uint16) for chunk in chunks]
    if header.codec == "int8":
        values = [
            quantise(rows[i : i + header.chunk_rows].float().numpy())[0] for i in range(0, len(rows), header.chunk_rows)
        ]
    stored = [np.frombuffer(encode_chunk(array, chunk, header.codec_level), dtype=np.uint8) for chunk in values]
    out = np.empty(array.chunk_bytes, dtype=np.uint8)
    training = np.ones(header.chunk_rows, dtype=bool)
    scales = np.ones(header.chunk_rows, dtype=np.float32)

    def decode() -> None:
        for chunk in stored:
            decode_chunk(array, chunk, out)
            if header.codec == "int8":
                dequantise(out.view(np.int8).reshape(header.chunk_rows, -1), scales)

    raw = bits.nbytes / 1e6
    return {
        "encode MB/s": round(
            raw / cpu_seconds(lambda: [encode_chunk(array, v, header.codec_level) for v in values]), 1
        ),
        "write MB/s": round(
            raw / cpu_seconds(lambda: [encode_hook_chunk(header, arrays, name, c, training) for c in chunks]), 1
        ),
        "decode MB/s": round(raw / cpu_seconds(decode), 1),
    }


def measure(codec: str, level: int | None, rows: torch.Tensor, context: int) -> dict[str, float]:
    """Return what a codec does to rows that are written to a store and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        with ActivationStoreWriter(path, {"rows": rows.shape[1]}, context, codec=codec, codec_level=level) as writer:
            writer.append({"rows": rows.unflatten(0, (-1, context))})
        store = ActivationStore.open(path)
        read = store.read("rows", 0, store.n_rows)
        lossless = torch.equal(read.view(torch.int16), rows.view(torch.int16))
        if codec != "int8" and not lossless:
            raise SystemExit(f"{codec} does not give back what was written: no speed is printed")
        exact, error = rows.double(), read.double() - rows.double()
        variance = (exact - exact.mean(0)).square().sum()
        stored = sum(f.bytes for r in store.manifest.shards for k, f in r.files.items() if "rows/" in k)
        found: dict[str, float] = {
            "bytes per token": round(stored / len(rows), 2),
            "stored / raw bfloat16": round(stored / (rows.numel() * 2), 4),
            "NMSE": float(f"{(error.square().sum() / variance).item():.3g}"),
        }
        result: list[dict[str, float]] = []
        thread = threading.Thread(target=lambda: result.append(speeds(store.manifest.header, rows)))
        thread.start()
        thread.join()
        return found | result[0]


def main() -> None:
    """Measure every codec; print a table and write runs/bench/store_codecs.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--rows", type=int, default=65_536)
    arguments = parser.parse_args()
    source = ActivationStore.open(arguments.store)
    context = source.context_size
    n = min(arguments.rows, source.n_rows) // context * context
    found = {}
    print("hook point             codec      of raw  bytes/token      NMSE   encode   decode  writer's work (MB/s)")
    for hook_point in source.hook_points:
        rows = source.read(hook_point, 0, n).clone()
        for codec, level in (("none", None), ("lz4", 1), ("lz4", None), ("zstd", None), ("zstd", 3), ("int8", None)):
            name = codec if level is None else f"{codec} {level}"
            line = measure(codec, level, rows, context)
            found[f"{hook_point}, {name}"] = line
            rates = "".join(f"{line[key]:>9,.0f}" for key in ("encode MB/s", "decode MB/s", "write MB/s"))
            print(
                f"{hook_point:<22} {name:<9} {line['stored / raw bfloat16']:>7.3f} {line['bytes per token']:>12.1f} "
                f"{line['NMSE']:>9.2g}{rates}",
                flush=True,
            )
    target = Path("runs/bench/store_codecs.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"rows": n, "codecs": found}, indent=2) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
