"""Measure the bytes, speeds and error of every codec on real activations, with the store's own code.

    python benchmarks/store_codecs.py [--store runs/demo/store] [--rows 65536] [--train-rows 600000]

Speeds are MB of raw bfloat16 rows per CPU second of one thread, which is steady on a shared machine. The run stops if a
lossless codec is not lossless.

With `--train-rows`, the same SAEs (top-k 32 of 2,048 latents, same seeds, same rows in the same order) are trained from
a raw store and from an int8 store of the last hook point, and evaluated on the held-out rows of the raw store. Lossless
stores of these rows are instead compared with the raw store bit for bit: equal rows in the same order give equal SAEs.
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

from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.store.format.codecs import decode_chunk, dequantise_rows, encode_chunk, quantise
from thresher.shared.store.format.layout import CHUNK_BYTES, Header, arrays_of
from thresher.shared.store.write.encode import encode_hook_chunk
from thresher.train import TrainConfig, train

ROUNDS = 3
CODECS = (("none", None), ("lz4", 1), ("lz4", None), ("zstd", None), ("zstd", 3), ("int8", None))


def cpu_seconds(action) -> float:
    """Return the smallest number of CPU seconds of this thread that an action took."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        action()
        best = min(best, time.thread_time() - start)
    return best


def speeds(header: Header, rows: torch.Tensor) -> dict[str, float]:
    """Return a codec's encode and decode speed, and that of the writer's whole work for a chunk, with moments."""
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
                dequantise_rows(out.view(np.int8).reshape(header.chunk_rows, -1), scales)

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
    """Return the size and error of rows that are written with a codec and read back."""
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


def copy(source: ActivationStore, hook_point: str, n_rows: int, codec: str, path: Path) -> ActivationStore:
    """Write the first rows of one hook point to a store of another codec, with the same rows in each chunk."""
    context = source.context_size
    held_out = source.held_out_contexts()
    chunk_bytes = CHUNK_BYTES // 2 if codec == "int8" else CHUNK_BYTES
    settings = {"mask_token_ids": source.manifest.header.mask_token_ids, "chunk_bytes": chunk_bytes}
    with ActivationStoreWriter(path, {hook_point: source.d_in(hook_point)}, context, codec=codec, **settings) as writer:
        for start in range(0, n_rows, 64 * context):
            stop = min(start + 64 * context, n_rows)
            tokens = source.tokens(start, stop)
            writer.append(
                {hook_point: source.read(hook_point, start, stop).unflatten(0, (-1, context))},
                None if tokens is None else tokens.reshape(-1, context),
                held_out=held_out[start // context : stop // context],
            )
    return ActivationStore.open(path)


def train_saes(store: ActivationStore, hook_point: str, seeds: int, epochs: float, output: Path) -> list[Path]:
    """Train one SAE per seed, all from the same stream."""
    table = {"architecture": "topk", "hook_point": hook_point, "d_sae": 2048, "k": 32, "lr": 8e-3}
    saes = [table | {"name": f"seed-{seed}", "seed": seed} for seed in range(seeds)]
    settings = {"batch_size": 2048, "epochs": epochs, "warmup_steps": 50, "decay_fraction": 0.3}
    return train(TrainConfig(store=str(store.path), output=str(output), sae=saes, **settings))


def explained_variance(folder: Path, rows: torch.Tensor) -> float:
    """Return 1 - |x - x_hat|^2 / |x - mean|^2 over rows."""
    sae = Sae.load(folder)
    with torch.inference_mode():
        error = sum(float((sae(part.float()) - part.float()).double().square().sum()) for part in rows.split(4096))
    return 1 - error / float((rows.double() - rows.double().mean(0)).square().sum())


def quality(source: ActivationStore, hook_point: str, n_rows: int, seeds: int, epochs: float) -> dict[str, list[float]]:
    """Return the explained variance, on the original held-out rows, of SAEs trained from each codec's store."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        raw = copy(source, hook_point, n_rows, "none", Path(folder) / "none")
        held_out = np.repeat(raw.held_out_contexts(), raw.context_size) & raw.row_mask(0, raw.n_rows)
        judged = raw.read(hook_point, 0, raw.n_rows)[torch.from_numpy(held_out)]
        for codec in ("none", "int8", "lz4", "zstd"):
            store = raw if codec == "none" else copy(source, hook_point, n_rows, codec, Path(folder) / codec)
            if store.chunk_rows != raw.chunk_rows or store.n_rows != raw.n_rows:
                raise SystemExit(f"the {codec} store holds other chunks than the raw one: its order would differ")
            if codec in ("none", "int8"):
                saes = train_saes(store, hook_point, seeds, epochs, Path(folder) / f"saes-{codec}")
                found[codec] = [round(explained_variance(sae, judged), 5) for sae in saes]
            else:
                parts = (slice(i, min(i + 65_536, raw.n_rows)) for i in range(0, raw.n_rows, 65_536))
                for part in parts:
                    rows = [s.read(hook_point, part.start, part.stop).view(torch.int16) for s in (raw, store)]
                    if not torch.equal(*rows):
                        raise SystemExit(f"{codec} does not give back what was written")
                found[codec] = found["none"]
            print(f"{hook_point:<22} {codec:<9} explained variance {found[codec]}", flush=True)
    return found


def main() -> None:
    """Measure every codec; print a table and write it to runs/bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--train-rows", type=int, default=0, help="rows to train SAEs on, from a raw and an int8 store")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/store_codecs.json"))
    arguments = parser.parse_args()
    source = ActivationStore.open(arguments.store)
    context = source.context_size
    n = min(arguments.rows, source.n_rows) // context * context
    codecs: dict[str, dict[str, float]] = {}
    found: dict[str, object] = {"store": arguments.store.name, "rows": n, "codecs": codecs}
    print("hook point             codec      of raw  bytes/token      NMSE   encode   decode  writer's work (MB/s)")
    for hook_point in source.hook_points:
        rows = source.read(hook_point, 0, n).clone()
        for codec, level in CODECS:
            name = codec if level is None else f"{codec} {level}"
            line = measure(codec, level, rows, context)
            codecs[f"{hook_point}, {name}"] = line
            rates = "".join(f"{line[key]:>9,.0f}" for key in ("encode MB/s", "decode MB/s", "write MB/s"))
            print(
                f"{hook_point:<22} {name:<9} {line['stored / raw bfloat16']:>7.3f} {line['bytes per token']:>12.1f} "
                f"{line['NMSE']:>9.2g}{rates}",
                flush=True,
            )
    if arguments.train_rows:
        hook_point = source.hook_points[-1]
        train_rows = min(arguments.train_rows, source.n_rows) // context * context
        found |= {"trained rows": train_rows, "trained hook point": hook_point, "epochs": arguments.epochs}
        found["explained variance"] = quality(source, hook_point, train_rows, arguments.seeds, arguments.epochs)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
