"""Measure the speed of building the feature index of one SAE, in tokens per second.

    python benchmarks/feature_index.py

A TopK SAE of 2,048 latents is indexed over the rows of a synthetic store. Before any speed is printed, firings, maxima
and the strongest contexts of the first rows are compared with a loop over the dense latents. The floor is to read the
rows and multiply them with the encoder. CPU seconds show the cost also on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from thresher.evaluate.features.build import FeatureSettings, build_feature_index
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore, ActivationStoreWriter

HOOK, CONTEXT, CHECKED_CONTEXTS = "blocks.2.resid_post", 256, 64
TARGET = 30_000


def write_store(path: Path, n_rows: int, d_in: int) -> ActivationStore:
    """Write low-rank rows with a mean and random tokens, with a BOS per context and documents of four contexts."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    with ActivationStoreWriter(path, {HOOK: d_in}, CONTEXT, mask_token_ids=[0]) as writer:
        for first in range(0, -(-n_rows // CONTEXT), 16):
            latents = torch.randn(16 * CONTEXT, 4 * d_in, generator=generator).sub_(2).relu_()
            tokens = torch.randint(1, 4096, (16, CONTEXT), generator=generator, dtype=torch.int32)
            tokens[:, 0] = 0
            documents = np.repeat(np.arange(first, first + 16)[:, None] // 4, CONTEXT, axis=1)
            rows = (3 + latents @ directions).reshape(16, CONTEXT, d_in)
            writer.append({HOOK: rows}, tokens.numpy(), documents=documents)
    return ActivationStore.open(path)


def make_sae(architecture: str, store: ActivationStore, d_sae: int, k: int) -> Sae:
    """Return an SAE with random unit directions; in a ReLU SAE, about k latents fire per row."""
    d_in = store.d_in(HOOK)
    W_dec = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(d_sae), "W_dec": W_dec}
    if architecture == "standard":
        rows = store.read(HOOK, 0, 4096).float() - 3
        tensors["b_enc"] -= (rows @ W_dec.T).quantile(1 - k / d_sae, dim=0)
    return Sae(architecture, tensors | {"b_dec": torch.full((d_in,), 3.0)}, config={"k": k})


def check_equal(store: ActivationStore, sae: Sae, root: Path) -> None:
    """Stop unless the index of the first contexts equals the result of a plain loop over dense latents."""
    n_rows = CHECKED_CONTEXTS * CONTEXT
    part = SimpleNamespace(name="checked", sae=sae, hook_point=HOOK, target=HOOK)
    small = write_store(root / f"checked-{sae.architecture}", n_rows, store.d_in(HOOK))
    index = build_feature_index(small, [part], root, settings=FeatureSettings())["checked"]
    latents = sae.encode(small.read(HOOK, 0, n_rows)).numpy() * np.asarray(small.row_mask(0, n_rows))[:, None]
    peaks = latents.reshape(CHECKED_CONTEXTS, CONTEXT, -1).max(axis=1)
    for line in (line for lines in index.batches() for line in lines):
        number = line["latent"]
        strongest = np.sort(peaks[:, number])[::-1][: min(10, (peaks[:, number] > 0).sum())]
        same = line["firings"] == (latents[:, number] > 0).sum()
        same &= bool(np.isclose(line["max_activation"], latents[:, number].max(), rtol=1e-5))
        shown = [entry["activation"] for entry in line["top"]]
        if not same or not np.allclose(shown, strongest, rtol=1e-5):
            sys.exit(f"latent {number} of the index is not what a plain loop finds: no speed for a wrong result")


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Return an action's wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.inference_mode()
def encoder_floor(store: ActivationStore, sae: Sae) -> None:
    """Read every row, multiply it with the encoder, and do nothing else."""
    for start in range(0, store.n_rows, 2048):
        torch.addmm(sae.b_enc, store.read(HOOK, start, min(start + 2048, store.n_rows)).float(), sae.W_enc)


def main() -> None:
    """Measure and print one JSON object; `--output` writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/feature_index.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {name: getattr(options, name) for name in ("rows", "d_in", "d_sae", "k")}
    result |= {"threads": torch.get_num_threads(), "target_tokens_per_second": TARGET}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = write_store(root / "store", options.rows, options.d_in)
        for architecture in ("topk", "standard"):
            sae = make_sae(architecture, store, options.d_sae, options.k)
            check_equal(store, sae, root)
            named = SimpleNamespace(name=architecture, sae=sae, hook_point=HOOK, target=HOOK)
            wall, cpu = timed(lambda named=named: build_feature_index(store, [named], root / "features"))
            result[f"{architecture}_tokens_per_second"] = store.n_rows / wall
            result[f"{architecture}_tokens_per_cpu_second"] = store.n_rows / cpu
        wall, cpu = timed(lambda: encoder_floor(store, sae))
        result |= {"floor_tokens_per_second": store.n_rows / wall, "floor_tokens_per_cpu_second": store.n_rows / cpu}
    text = json.dumps({name: round(v) if isinstance(v, float) else v for name, v in result.items()}, indent=2)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
