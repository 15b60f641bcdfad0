"""Harvest a small activation store from the bundled model, and read it.

    python examples/harvest_and_read.py [OUTPUT]

Takes a few seconds on a CPU and needs no network. Running it again reuses the store.
"""

from __future__ import annotations

import sys
from pathlib import Path

from thresher import ActivationStore, HarvestConfig, ShuffledBatches, harvest

MODEL = Path(__file__).parents[1] / "models" / "stdlib-lm"
HOOK_POINT = "blocks.2.resid_post"


def main(output: Path) -> ActivationStore:
    # One forward pass fills the store with the activations of both hook points. The model is cut off after block 2.
    config = HarvestConfig(
        model=str(MODEL),
        dataset="python-stdlib",
        hook_points=["blocks.1.resid_post", HOOK_POINT],
        tokens=32_768,
        store=str(output / "store"),
    )
    harvest(config)

    store = ActivationStore.open(output / "store")
    print(store)

    # Rows are in the order of the text. The first row of each document is the BOS token, which is masked.
    rows = store.read(HOOK_POINT, 0, 1024)  # [1024, d_in], bfloat16
    usable = store.row_mask(0, 1024)
    print(f"read {tuple(rows.shape)} {rows.dtype}, {(~usable).sum()} rows masked")

    # Exact mean and norms over the training rows were computed during the harvest.
    moments = store.moments(HOOK_POINT)
    print(f"{moments.count:,} training rows, mean norm {moments.sum_norm / moments.count:.2f}")

    # Which document does a row belong to, and at which position?
    documents, positions = store.documents(1000, 1001)
    _, name = store.document_info(int(documents[0]))
    print(f"row 1000 is token {positions[0]} of {name}")

    # What training reads: rows in a random order that depends only on the seed, the epoch and the store. With n_rows
    # the stream ends; without it, epoch follows epoch.
    for batch in ShuffledBatches(store, [HOOK_POINT], batch_size=4096, n_rows=3 * 4096):
        print(f"batch {tuple(batch[HOOK_POINT].shape)}, mean {batch[HOOK_POINT].float().mean():.4f}")
    return store


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/harvest"))
