"""The recipes in the documents for a store of one's own, run as they are written but for their sizes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher.evaluate import EvaluateConfig, evaluate
from thresher.shared import ActivationStore
from thresher.shared.sae import Sae

ROOT = Path(__file__).parents[1]
SIZES = {"README.md": {"4096": "12", "1024": "16"}, "docs/FORMAT.md": {"1024": "12", "197": "16"}}
N = 60


def recipe(document: str) -> str:
    """Return the block of Python that writes a store, for small rows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "with ActivationStoreWriter(" in block]
    for size, small in SIZES[document].items():
        assert size in block
        block = re.sub(rf"\b{size}\b", small, block)
    return block


@pytest.mark.parametrize("document", SIZES)
def test_a_store_written_as_documented_can_be_evaluated(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thresher.shared.store.local.durable.flush", lambda handle: None)
    rows = torch.randn(N, 16, 12, generator=torch.Generator().manual_seed(0))
    given = {"batches": rows.split(7), "n_contexts": N, "rows_of": lambda start, stop: rows[start:stop]}
    exec(compile(recipe(document), document, "exec"), given)
    (path,) = [path.parent for path in tmp_path.rglob("manifest.jsonl")]
    store = ActivationStore.open(path)
    (hook_point,) = store.hook_points
    assert store.complete
    assert np.flatnonzero(store.held_out_contexts()).tolist() == [0, 20, 40]
    stored = store.read(hook_point, 0, store.n_rows)
    assert torch.equal(stored, rows.reshape(-1, 12).bfloat16())

    W_dec = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1))).Q
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(12), "W_dec": W_dec, "b_dec": torch.zeros(12)}
    Sae("topk", tensors, hook_point=hook_point, config={"k": 12}).save(tmp_path / "saes" / "sae")
    (metrics,) = evaluate(EvaluateConfig(store=str(path), saes="saes", output="out", bootstrap_samples=10))
    assert metrics["n_rows"] == 3 * 16
    held_out = stored.reshape(N, 16, 12)[[0, 20, 40]].reshape(-1, 12).double().numpy()
    reconstructed = np.maximum(held_out @ W_dec.T.double().numpy(), 0) @ W_dec.double().numpy()  # TopK's ReLU
    residual = ((held_out - reconstructed) ** 2).sum()
    total = ((held_out - held_out.mean(0)) ** 2).sum()
    assert metrics["explained_variance"] == pytest.approx(1 - residual / total, abs=1e-5)
