"""The same steered logits and the same attribution as SAELens with TransformerLens, for the same SAE and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from thresher import Clamp, LogitDifference, SaeModel
from thresher.shared.sae import Sae

pytestmark = pytest.mark.peers

HOOK, WIDTH = "blocks.1.resid_post", 32


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_steering_and_attribution_agree(tmp_path, run_peers, architecture):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_embd=WIDTH, n_head=4, n_positions=24, vocab_size=60)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)
    model.save_pretrained(tmp_path / "model")
    tensors = {"W_enc": torch.randn(WIDTH, 64) / WIDTH**0.5, "b_enc": torch.full((64,), -0.2)}
    tensors |= {
        "W_dec": torch.nn.functional.normalize(torch.randn(64, WIDTH), dim=1),
        "b_dec": 0.1 * torch.randn(WIDTH),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = torch.full((64,), 0.3)
    sae = Sae(architecture, tensors, hook_point=HOOK, config={"k": 8} if architecture == "topk" else {})
    sae.save(tmp_path / "sae")
    tokens = torch.randint(1, 60, (3, 12))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    script = Path(__file__).with_name("saelens_steering.py")
    run_peers(script, tmp_path / "model", tmp_path / "sae", tmp_path / "tokens.npy", 7, tmp_path / "theirs.npz")
    theirs = np.load(tmp_path / "theirs.npz")
    lm = SaeModel.open(model, [tmp_path / "sae"])
    run = lm.run(tokens)
    scores = lm.attribute(run, LogitDifference(3, 5)).latents[HOOK].to_dense().numpy()
    with lm.steer({(HOOK, 7): Clamp(5.0)}):
        steered = lm.run(tokens).logits.numpy()
    assert np.abs(steered - run.logits.numpy()).max() > 0.1
    np.testing.assert_allclose(run.logits.numpy(), theirs["clean"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(steered, theirs["steered"], rtol=1e-4, atol=1e-4)
    assert np.abs(scores).max() > 1e-2
    np.testing.assert_allclose(scores, theirs["scores"], rtol=1e-4, atol=1e-4)
