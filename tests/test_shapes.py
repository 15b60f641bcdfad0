"""Annotated shapes are those of a run: every function that names shapes checks them while SAEs are trained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHILD = """
import sys
from jaxtyping import install_import_hook
sys.path.insert(0, sys.argv[1])
install_import_hook([f"thresher.{name}" for name in ("shared", "train")], "shape_checks.check_shapes")
import numpy as np
import torch
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStoreWriter
from thresher.train import TrainConfig, train
import shape_checks

torch.set_num_threads(1)
root, A, B = sys.argv[2], "blocks.0.mlp_in", "blocks.0.mlp_out"
generator = torch.Generator().manual_seed(0)
with ActivationStoreWriter(f"{root}/store", {A: 24, B: 24}, 16) as writer:
    rows = {hook: torch.randn(64, 16, 24, generator=generator) for hook in (A, B)}
    writer.append(rows, held_out=np.arange(64) % 5 == 0)
tables = [
    {"architecture": name, "dead_after_tokens": 64, **keys, **({"k": 5} if "topk" in name else {})}
    for name, keys in {
        "topk": {}, "batch_topk": {}, "matryoshka_batch_topk": {}, "hierarchical_topk": {},
        "standard": {"l1_coefficient": 0.3}, "gated": {"l1_coefficient": 0.3}, "jumprelu": {"l0_coefficient": 0.1},
    }.items()
]
for table in tables:
    table |= {"hook_point": A, "d_sae": 64}
tables.append({"architecture": "topk", "reads": A, "writes": B, "skip": True, "d_sae": 64, "k": 5})
for kernels in ("auto", "reference"):
    folders = train(TrainConfig(
        store=f"{root}/store", output=f"{root}/{kernels}", sae=tables, batch_size=64, tokens=512, warmup_steps=2,
        device="cpu", kernels=kernels,
    ))
    for folder in folders:
        Sae.load(folder)(torch.randn(3, 24))
print(shape_checks.n_checked)
"""


def test_annotated_shapes_are_those_of_a_run(tmp_path):
    child = [sys.executable, "-P", "-c", CHILD, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 100
