"""Steering files give the same logits, and tasks the same log-probabilities, in lm-evaluation-harness as here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher import Add, Orthogonal, SaeModel
from thresher.evaluate.causal import steer_command
from thresher.evaluate.causal.lm_eval_files import read_lm_eval, write_lm_eval
from thresher.shared.sae import Sae

pytestmark = pytest.mark.peers

MODEL = Path(__file__).parents[3] / "models" / "stdlib-lm"
HOOK, PLACE = "blocks.2.resid_post", "h.2"
SCRIPT = Path(__file__).with_name("lm_eval_steered.py")
TASK = """
task: continuations
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{end}}"
target_delimiter: ""
metric_list: [{metric: perplexity}]
"""


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(64, 256, generator=generator), dim=1)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(64), "W_dec": 2 * W_dec}
    tensors["b_dec"] = 0.5 * torch.randn(256, generator=generator)
    return Sae("topk", tensors, hook_point=HOOK, config={"k": 8})


@pytest.fixture
def tokens(tmp_path):
    found = torch.randint(0, 1000, (2, 9), generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "tokens.npy", found.numpy())
    return found


def test_a_csv_of_sparsify_steers_as_in_the_harness(sae, tokens, tmp_path, run_peers):
    sae.save(tmp_path / "sparse" / PLACE, format="sparsify")
    path = tmp_path / "steer.csv"
    path.write_text(
        "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description,\n"
        f"sparsify,clamp,{tmp_path / 'sparse'},{PLACE},30,10.0,,,,\n"
    )
    run_peers(SCRIPT, MODEL, path, tmp_path / "tokens.npy", tmp_path / "theirs.npz")
    lm = SaeModel.open(MODEL, skip_first_token=False)
    clean = lm.run(tokens).logits
    with lm.steer(read_lm_eval(lm, path)):
        steered = lm.run(tokens).logits.numpy()
    np.testing.assert_allclose(steered, np.load(tmp_path / "theirs.npz")["logits"], rtol=1e-4, atol=1e-4)
    assert np.abs(steered - clean.numpy()).max() > 0.5


@pytest.mark.parametrize("edit", [Add(6.0), Orthogonal()])
def test_edits_that_are_written_steer_the_harness(sae, tokens, tmp_path, run_peers, edit):
    lm = SaeModel.open(MODEL, [sae], skip_first_token=False)
    edits = {(HOOK, 30): edit, ("blocks.1.mlp_out", sae.W_dec[5]): Add(-3.0)}
    path = write_lm_eval(lm, edits, tmp_path / "steer.pt")
    run_peers(SCRIPT, MODEL, path, tmp_path / "tokens.npy", tmp_path / "theirs.npz")
    with lm.steer(edits):
        ours = lm.run(tokens).logits.numpy()
    np.testing.assert_allclose(ours, np.load(tmp_path / "theirs.npz")["logits"], rtol=1e-4, atol=1e-4)
    with lm.steer(read_lm_eval(lm, path)):
        np.testing.assert_allclose(lm.run(tokens).logits.numpy(), ours, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_harness_runs_a_task_with_what_the_command_writes(sae, tokens, tmp_path, run_peers):
    sae.save(tmp_path / "sae")
    arguments = ["--latent", "30", "--prompts", "import os", "--strengths", "0,4", "--random_latents", "0"]
    more = ["--saes", str(tmp_path / "sae"), "--output", str(tmp_path), "--max_new_tokens", "2", "--lm_eval", "true"]
    assert (
        steer_command.main(["--model", str(MODEL), "--device", "cpu", *arguments, *more, "--unit", "activation"]) == 0
    )
    pairs = [("import", " os"), ("def read(path):\n    with open", "(path)"), ("raise", " ValueError(name)")]
    lines = [json.dumps({"prompt": prompt, "end": end}) for prompt, end in pairs]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "texts.jsonl").write_text("\n".join(lines))
    (tmp_path / "task" / "continuations.yaml").write_text(TASK % (tmp_path / "task" / "texts.jsonl"))
    files = [tmp_path / "tokens.npy", tmp_path / "theirs.npz", tmp_path / "task"]
    run_peers(SCRIPT, MODEL, tmp_path / "strength-4.pt", *files, HF_HOME=str(tmp_path / "hub"))
    lm = SaeModel.open(MODEL, [tmp_path / "sae"], skip_first_token=False)
    expected, clean = [], []
    for prompt, end in pairs:
        start, whole = (lm.tokenizer(text)["input_ids"] for text in (prompt, prompt + end))
        for found, edits in ((expected, {(HOOK, 30): Add(4.0)}), (clean, {})):
            with lm.steer(edits):
                logits = lm.run([whole]).logits[0].log_softmax(-1)
            found.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(start), len(whole))))
    theirs = np.load(tmp_path / "theirs.npz")["log_probabilities"]
    np.testing.assert_allclose(theirs, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(theirs - clean).max() > 0.1
