"""docs/metrics.md says of every key that an evaluation writes what it can and cannot say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thresher.evaluate import evaluate
from thresher.evaluate.report.definitions import METRICS, NOT_COLUMNS, PER_HOOK
from thresher.harvest import harvest
from thresher.shared import Sae
from thresher.shared.synthetic.law import LAWS, SyntheticLaw

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
HOOK = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def described():
    """The keys of the first cells of the page's tables."""
    cells = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


def test_the_columns_of_the_report_are_described(described):
    columns = {column.key for column in (*METRICS, *PER_HOOK)} | set(NOT_COLUMNS)
    assert sorted(columns - described) == []


def test_what_the_full_suite_writes_is_described(described, tiny, make_sae, tmp_path):
    tiny.model.save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    for name, keys in {"even-1": {"seed": 1}, "even-2": {"seed": 2}, "odd-1": {"seed": 1}}.items():
        sae = make_sae("standard", seed=len(name) + keys["seed"])
        sae.config |= {"architecture": "standard", **keys}
        sae.metadata["documents"] = name.split("-")[0]
        sae.save(tmp_path / "saes" / name)
    make_sae(k=3).save(tmp_path / "saes" / "topk")
    tensors = {name: getattr(make_sae(k=3), name).detach() for name in ("W_enc", "W_dec", "b_dec", "b_enc")}
    tensors |= {"W_enc": tensors["W_enc"].repeat(2, 1), "W_dec": tensors["W_dec"].repeat(1, 2)}
    tensors["b_dec"] = tensors["b_dec"].repeat(2)
    both = {"k": 3, "hook_points": ["blocks.0.resid_post", HOOK], "apply_b_dec_to_input": False}
    Sae("topk_crosscoder", tensors, hook_point=HOOK, config=both).save(tmp_path / "saes" / "both")
    texts = [json.dumps({"text": f"w{1 + n % 40} w{1 + n // 40}", "label": str(n % 2)}) for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    rows = evaluate(
        store=str(tiny.store),
        saes=str(tmp_path / "saes"),
        output=str(tmp_path / "out"),
        model=str(tmp_path / "model"),
        suite="full",
        refine="leave_one_out",
        probe_texts=str(tmp_path / "texts.jsonl"),
        feature_rows=0,
        bootstrap_samples=2,
    )
    keys = {key for row in rows for key in row} | {
        key for row in rows for part in row.get("per_hook", ()) for key in part
    }
    wanted = {"half_stability", "seed_stability", "label_accuracy_k1", "per_hook", "notes"}
    assert wanted <= keys
    assert sorted(keys - described) == []


def test_what_a_synthetic_store_adds_is_described(described, tmp_path, monkeypatch):
    law = SyntheticLaw(
        n_features=60, d_in=24, n_roots=3, branching=3, depth=2, max_probability=0.5, min_probability=0.02
    )
    monkeypatch.setitem(LAWS, "tiny", law)
    store = tmp_path / "store"
    harvest(
        model="synthetic:tiny",
        hook_points=["features"],
        store=str(store),
        tokens=4096,
        holdout_fraction=0.3,
        context_size=64,
        chunk_bytes=4096,
    )
    W_dec = torch.nn.functional.normalize(
        torch.from_numpy(np.random.default_rng(0).normal(size=(8, 24))).float(), dim=1
    )
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(8), "W_dec": W_dec, "b_dec": torch.zeros(24)}
    Sae("topk", tensors, hook_point="features", config={"k": 2}).save(tmp_path / "saes" / "topk")
    rows = evaluate(
        store=str(store),
        saes=str(tmp_path / "saes"),
        output=str(tmp_path / "out"),
        ground_truth_rows=500,
        bootstrap_samples=2,
        feature_rows=0,
        allow_other_model=True,
    )
    assert "f1" in rows[0]
    assert sorted({key for row in rows for key in row} - described) == []
