"""Losses of a spliced model: against float64 arithmetic, hand-written hooks and SAEs whose effect is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from thresher.evaluate.metrics import encoding
from thresher.evaluate.metrics.bootstrap import confidence_intervals, point_estimates
from thresher.evaluate.metrics.held_out import HeldOut
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.evaluate.with_model import splice_losses as module
from thresher.evaluate.with_model.splice_losses import CleanRun, accumulate_losses, splice_metrics, token_losses
from thresher.shared.model.language_model import resolve_hook_points
from thresher.shared.sae import Sae

HOOK = "blocks.0.resid_post"
D, CONTEXT, VOCABULARY = 16, 9, 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=D, n_head=2, n_positions=CONTEXT, vocab_size=VOCABULARY, bos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def rows():
    """Five contexts of tokens with a masked token here and there, as the store would give them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (5, CONTEXT))
    tokens[:, 0] = 0
    tokens[2, 5] = 0
    mean = rng.normal(size=D)
    store = SimpleNamespace(
        path="store",
        context_size=CONTEXT,
        tokens=lambda start, stop: torch.from_numpy(tokens.reshape(-1)[start:stop]).int(),
        moments=lambda hook: SimpleNamespace(mean=mean),
    )
    group = np.repeat([[0], [0], [1], [2], [3]], CONTEXT, axis=1)
    return HeldOut(store, np.arange(5), tokens != 0, group, 4)


def identity_sae(hook_point=HOOK, shift=0.0):
    """A ReLU SAE of 2D latents that returns its input plus a ramp; a constant would vanish in the layer norm."""
    eye = torch.eye(D)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * D), "W_dec": torch.cat([eye, -eye])}
    sae = Sae("standard", tensors | {"b_dec": shift * torch.linspace(-1, 2, D)}, hook_point=hook_point)
    sae.apply_b_dec_to_input = False
    return EvaluatedSae(f"shift{shift}", None, sae, hook_point, hook_point)


@pytest.mark.parametrize("entries", [1 << 25, 130])
def test_token_losses_in_float64(monkeypatch, entries):
    monkeypatch.setitem(module.VOCABULARY_ENTRIES, "cpu", entries)
    generator = torch.Generator().manual_seed(0)
    clean, logits = 3 * torch.randn(2, 3, 7, 41, generator=generator)
    tokens = torch.randint(0, 41, (3, 7), generator=generator)
    losses = token_losses(logits, CleanRun(clean), tokens)
    expected = F.cross_entropy(logits[:, :-1].double().transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(losses["ce"][:, :-1].double(), expected, rtol=1e-6, atol=1e-6)
    p, q = clean.double().softmax(-1), logits.double().softmax(-1)
    torch.testing.assert_close(losses["kl"].double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert losses["agree"].tolist() == (p.argmax(-1) == q.argmax(-1)).float().tolist()
    assert token_losses(clean, CleanRun(clean), tokens)["kl"].abs().max() == 0


def by_hand(model, rows, replace):
    """CE and KL per position, one context at a time, with a hook of our own."""
    ce, kl, agree = [], [], []
    for context in rows.contexts:
        tokens = rows.store.tokens(context * CONTEXT, (context + 1) * CONTEXT).long()[None]
        usable = torch.from_numpy(rows.usable[context])
        clean = model(tokens).logits.double()
        handle = model.transformer.h[0].register_forward_hook(
            lambda _, __, out, usable=usable: replace(out if isinstance(out, torch.Tensor) else out[0], usable)
        )
        logits = model(tokens).logits.double()
        handle.remove()
        kept = usable[:-1] & usable[1:]
        ce.append(F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")[kept])
        kl.append(F.kl_div(logits.log_softmax(-1), clean.softmax(-1), reduction="none").sum(-1)[0][usable])
        agree.append((clean.argmax(-1) == logits.argmax(-1)).double()[0][usable])
    return [float(torch.cat(values).mean()) for values in (ce, kl, agree)]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_against_hand_written_hooks(model, rows, batch_size):
    sae = identity_sae(shift=0.7)
    hook_points = resolve_hook_points(model, [HOOK])
    sums = accumulate_losses(model, hook_points, [identity_sae(), sae], rows, batch_size)
    metrics = point_estimates(splice_metrics, sums["shift0.7"])

    def shifted(activation, usable):
        return torch.where(usable[None, :, None], activation + 0.7 * torch.linspace(-1, 2, D), activation)

    mean = torch.from_numpy(rows.store.moments(HOOK).mean).float()
    runs = {
        "clean": lambda activation, usable: activation,
        "zero": lambda activation, usable: torch.zeros_like(activation),
        "mean": lambda activation, usable: mean.expand_as(activation),
        "sae": shifted,
    }
    expected = {name: by_hand(model, rows, replace) for name, replace in runs.items()}
    for name, (ce, kl, agree) in expected.items():
        assert metrics[f"ce_{name}"] == pytest.approx(ce, rel=1e-5)
        if name != "clean":
            assert metrics[f"kl_{name}"] == pytest.approx(kl, rel=1e-4)
            assert metrics["top1_agreement" if name == "sae" else f"top1_agreement_{name}"] == pytest.approx(agree)
    (clean, *_), (zero, kl_zero, _), (_, kl_mean, _), (ce, kl, _) = expected.values()
    assert metrics["ce_loss_score"] == pytest.approx((zero - ce) / (zero - clean), rel=1e-4)
    assert metrics["kl_div_score"] == pytest.approx((kl_zero - kl) / kl_zero, rel=1e-4)
    assert metrics["kl_div_score_mean_ablation"] == pytest.approx((kl_mean - kl) / kl_mean, rel=1e-4)


def test_an_sae_that_returns_its_input_loses_nothing(model, rows):
    sums = accumulate_losses(model, resolve_hook_points(model, [HOOK]), [identity_sae()], rows, 2)
    metrics = point_estimates(splice_metrics, sums["shift0.0"])
    assert metrics["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert metrics["kl_div_score"] == pytest.approx(1, abs=1e-5)
    assert metrics["top1_agreement"] == 1
    assert int(sums["shift0.0"]["n_kl"].sum()) == rows.n_rows == 5 * CONTEXT - 6
    assert int(sums["shift0.0"]["n_ce_saelens"].sum()) == rows.n_rows - 5
    assert int(sums["shift0.0"]["n_ce"].sum()) == rows.n_rows - 5 - 1  # the masked token within a context
    assert sums["shift0.0"]["n_kl"].tolist() == [16, 7, 8, 8]


def test_a_transcoder_reads_one_place_and_replaces_another(model, rows):
    """A transcoder equal to the block's MLP does not change the model; one that returns zero ablates it."""
    places = ("blocks.0.mlp_out", "blocks.1.mlp_out")
    tensors = {"W_enc": torch.zeros(D, 3), "b_enc": torch.zeros(3), "W_dec": torch.zeros(3, D)}
    skip = Sae("skip_transcoder", tensors | {"b_dec": torch.zeros(D), "W_skip": torch.eye(D)}, hook_point=places[0])
    sums = accumulate_losses(
        model,
        resolve_hook_points(model, places),
        [EvaluatedSae("skip", None, skip, *places), EvaluatedSae("same", None, skip, places[0], places[0])],
        rows,
        5,
    )
    metrics = {name: point_estimates(splice_metrics, value) for name, value in sums.items()}
    assert metrics["same"]["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    seen = {}
    first = model.transformer.h[0].mlp.register_forward_hook(lambda _, __, out: seen.update(x=out))
    tokens = torch.cat([rows.store.tokens(0, 5 * CONTEXT).long().reshape(5, CONTEXT)])
    usable = torch.from_numpy(rows.usable)
    clean = model(tokens).logits
    second = model.transformer.h[1].mlp.register_forward_hook(
        lambda _, __, out: torch.where(usable[..., None], seen["x"], out)
    )
    logits = model(tokens).logits
    first.remove()
    second.remove()
    kl = F.kl_div(logits.log_softmax(-1), clean.softmax(-1), reduction="none").sum(-1)[usable].mean()
    assert metrics["skip"]["kl_sae"] == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_reconstructions_are_made_a_few_rows_at_a_time(make_sae, monkeypatch, architecture):
    sae = make_sae(architecture)
    x = torch.randn(11, 16, generator=torch.Generator().manual_seed(0))
    seen, encode = [], encoding.encode
    monkeypatch.setattr(encoding, "rows_at_a_time", lambda sae: 4)
    monkeypatch.setattr(encoding, "encode", lambda sae, rows: seen.append(len(rows)) or encode(sae, rows))
    torch.testing.assert_close(encoding.reconstruct_in_parts(sae, x), sae(x))
    assert seen == [4, 4, 3]
    assert encoding.reconstruct_in_parts(sae, x[:0]).shape == (0, 16)


def test_resamples_without_a_next_token_cost_no_warning():
    names = ("ce", "ce_saelens", "kl", "agree")
    sums = {f"{name}_{run}": np.array([3.0, 2.0]) for name in names for run in ("zero", "mean", "sae")}
    sums |= dict.fromkeys(("ce_clean", "ce_saelens_clean"), np.array([1.0, 0.0]))
    sums |= dict.fromkeys(("n_ce", "n_ce_saelens"), np.array([2.0, 0.0])) | {"n_kl": np.array([3.0, 1.0])}
    low, high = confidence_intervals(splice_metrics, sums, 50, 0)["ce_clean"]  # some draw the second document alone
    assert low == high == 0.5
