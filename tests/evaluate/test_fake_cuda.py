"""Evaluation on tensors that claim to be on a GPU: no tensor of the CPU among its operands, and no wait per block."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from thresher.evaluate.metrics.held_out import HeldOut, RowBlock
from thresher.evaluate.metrics.offline import accumulate
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.evaluate.with_model.splice_losses import LossSums, accumulate_losses
from thresher.shared.model.language_model import resolve_hook_points
from thresher.shared.sae import Sae

from ..fake_cuda import DEVICE, fake_cuda, to_gpu

HOOK = "blocks.0.resid_post"
D, D_SAE, CONTEXT, N_CONTEXTS = 16, 32, 9, 5


def make_sae(architecture, **config):
    """Return an SAE with weights on the GPU, as `load_saes` does."""
    tensors = {
        "W_enc": torch.randn(D, D_SAE, device=DEVICE),
        "b_enc": torch.zeros(D_SAE, device=DEVICE),
        "W_dec": torch.randn(D_SAE, D, device=DEVICE),
        "b_dec": torch.zeros(D, device=DEVICE),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = torch.ones(D_SAE, device=DEVICE)
    return Sae(architecture, tensors, hook_point=HOOK, config=config)


class OnGpu(HeldOut):
    """Held-out rows whose blocks are on the GPU; what is read from the store has values, which fake tensors lack."""

    def blocks(self, hook_points, block_rows, device="cpu"):
        assert device == DEVICE
        for context in range(N_CONTEXTS):
            n = int(self.usable[context].sum())
            rows = {hook_point: torch.randn(n, D, device=device) for hook_point in hook_points}
            yield RowBlock(1, rows, torch.zeros(n, dtype=torch.int64, device=device))


@pytest.fixture
def rows():
    usable = np.ones((N_CONTEXTS, CONTEXT), dtype=bool)
    usable[:, 0] = usable[2, 5] = False
    tokens = np.arange(N_CONTEXTS * CONTEXT, dtype=np.int64) % 50
    store = SimpleNamespace(
        path="store",
        context_size=CONTEXT,
        d_in=lambda hook: D,
        tokens=lambda start, stop: torch.from_numpy(tokens[start:stop]),
        moments=lambda hook: SimpleNamespace(mean=np.zeros(D)),
    )
    return OnGpu(store, np.arange(N_CONTEXTS), usable, np.zeros((N_CONTEXTS, CONTEXT), dtype=np.int64), 1)


def evaluated(sae):
    return EvaluatedSae(sae.architecture, None, sae, HOOK, HOOK)


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_held_out_rows_are_encoded_and_summed_without_waiting(rows, architecture):
    with fake_cuda():
        sae = make_sae(architecture, **({"k": 3} if architecture == "topk" else {}))
        inputs, sums = accumulate([evaluated(sae)], rows, 64, DEVICE)
        held = [*vars(inputs[HOOK]).values(), *vars(sums[architecture].latents).values()]
    tensors = [tensor for tensor in held if isinstance(tensor, torch.Tensor)]
    assert len(tensors) >= 6
    assert {str(tensor.device) for tensor in tensors} == {DEVICE}


def test_losses_of_a_spliced_model_are_summed_without_waiting(rows, monkeypatch):
    config = GPT2Config(
        n_layer=2, n_embd=D, n_head=2, n_positions=CONTEXT, vocab_size=50, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    hook_points = resolve_hook_points(model, [HOOK])
    summed, read = [], []
    monkeypatch.setattr(LossSums, "sums", lambda self, run: summed.append((run, self)) or {})
    with fake_cuda():
        to_gpu(model)
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.Tensor,
                "cpu",
                lambda self: SimpleNamespace(numpy=lambda: read.append(self) or np.zeros(len(self))),
            )
            accumulate_losses(model, hook_points, [evaluated(make_sae("topk", k=3))], rows, 2)
    assert [run for run, _ in summed] == ["clean", "zero", "mean", "sae"]
    assert all(str(total.device) == DEVICE for _, sums in summed for total in sums._sums.values())
    assert read
    assert all(str(total.device) == DEVICE for total in read)
