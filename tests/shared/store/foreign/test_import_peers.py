"""Activations that SAELens and Llamascopium cached themselves are imported bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thresher.shared import ActivationStore
from thresher.shared.store.command import main

pytestmark = pytest.mark.peers

SAELENS = """
import sys, torch
from datasets import Dataset
from safetensors.torch import save_file
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens import cache_activations_runner as module
from transformer_lens import HookedTransformer, HookedTransformerConfig
torch.manual_seed(0)
model = HookedTransformer(HookedTransformerConfig(
    n_layers=2, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", seed=0))
model.tokenizer = type("T", (), {"bos_token_id": 0, "eos_token_id": 0, "padding_side": "right"})()
module.load_model = lambda **_: model
text = Dataset.from_dict({"tokens": torch.randint(1, 50, (40, 16)).tolist()})
root = sys.argv[1]
data = CacheActivationsRunner(CacheActivationsRunnerConfig(
    dataset_path="own", model_name="own", model_batch_size=4, hook_name="blocks.1.hook_resid_post", d_in=16,
    training_tokens=320, context_size=16, new_cached_activations_path=root + "/cached", prepend_bos=False,
    buffer_size_gb=1e-5, device="cpu", dtype="float32", streaming=False, shuffle=False), override_dataset=text).run()
data = data.with_format("torch")
save_file({"rows": torch.stack(list(data["blocks.1.hook_resid_post"])).float().contiguous(),
           "tokens": torch.stack(list(data["token_ids"])).contiguous()}, root + "/expected.safetensors")
data.with_format(None).to_parquet(root + "/cached.parquet")
"""

LLAMASCOPIUM = """
import sys, torch
from llamascopium import ActivationWriter, ActivationWriterConfig
names = ["blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"]
torch.manual_seed(0)
samples = [{**{name: torch.randn(8, 5).bfloat16() for name in names}, "tokens": torch.arange(8) + 10 * i,
            "mask": torch.ones(8, dtype=torch.bool), "attention_mask": torch.ones(8, dtype=torch.int)}
           for i in range(7)]
torch.save(samples, sys.argv[1] + "/expected.pt")
for form in ("pt", "safetensors"):
    ActivationWriter(ActivationWriterConfig(
        hook_points=names, n_samples_per_chunk=3, cache_dir=sys.argv[1] + "/" + form, format=form)).process(samples)
"""


def imported(source: Path, out: Path) -> ActivationStore:
    assert main(["import", str(source), "--store", str(out)]) == 0
    store = ActivationStore.open(out, verify="always")
    assert store.verify() == []
    return store


def test_what_saelens_cached(tmp_path, run_peers):
    run_peers("-c", SAELENS, tmp_path)
    expected = load_file(tmp_path / "expected.safetensors")
    n = expected["tokens"].numel()
    assert n >= 320
    (tmp_path / "hub").mkdir()
    (tmp_path / "cached.parquet").rename(tmp_path / "hub" / "train-00000-of-00001.parquet")
    for source in ("cached", "hub"):
        store = imported(tmp_path / source, tmp_path / f"{source}.store")
        assert store.hook_points == ("blocks.1.resid_post",)
        assert (store.context_size, store.n_rows) == (16, n)
        assert torch.equal(store.read("blocks.1.resid_post", 0, n), expected["rows"].view(n, 16))
        assert torch.equal(store.tokens(0, n), expected["tokens"].view(n).int())


def test_what_llamascopium_cached(tmp_path, run_peers):
    run_peers("-c", LLAMASCOPIUM, tmp_path)
    samples = torch.load(tmp_path / "expected.pt")
    for form in ("pt", "safetensors"):
        store = imported(tmp_path / form, tmp_path / f"{form}.store")
        assert (store.context_size, store.n_contexts, store.dtype) == (8, 7, torch.bfloat16)
        for name in ("blocks.0.mlp_out", "blocks.2.resid_post"):
            theirs = name.replace(".mlp", ".hook_mlp").replace(".resid", ".hook_resid")
            assert torch.equal(store.read(name, 0, 56), torch.cat([sample[theirs] for sample in samples]))
        assert store.tokens(0, 56).tolist() == torch.cat([sample["tokens"] for sample in samples]).tolist()
        assert store.row_mask(0, 56).all()
