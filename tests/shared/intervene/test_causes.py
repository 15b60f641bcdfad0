"""Ablation and attribution, against hooks and autograd written here in float64, and against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thresher import Ablate, Clamp, KLDivergence, LogitDifference, LogProbability, Sae, SaeModel
from thresher.shared.core.errors import InterventionError

HOOK = "blocks.1.resid_post"
MODEL = Path(__file__).parents[3] / "models" / "stdlib-lm"


def with_change(model, layer, change, tokens):
    """Return the logits of a model with `change` added to what a block returns."""
    handle = model.transformer.h[layer].register_forward_hook(lambda _, __, y: y + change)
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()


def loss(logits):
    """A metric of the user's own that is far from linear."""
    return logits[:, -1, :20].logsumexp(-1) + logits[:, 3, 5] ** 2


def test_an_ablation_is_a_pass_with_the_latent_taken_away(gpt2, make, tokens):
    sae = make()
    lm = SaeModel.open(gpt2, {HOOK: sae})
    run = lm.run(tokens)
    f, clean = run.latents[HOOK].to_dense(), loss(run.logits)
    effects = lm.ablate(run, loss, batch_size=7)
    assert torch.equal(effects.latents[HOOK].indices(), run.latents[HOOK].indices())
    nodes = run.latents[HOOK].indices()[:, ::9].T.tolist()
    for text, position, latent in nodes:
        change = torch.zeros(*tokens.shape, sae.d_in, dtype=torch.float64)
        change[text, position] = -f[text, position, latent] * sae.W_dec[latent]
        expected = (clean - loss(with_change(gpt2, 1, change, tokens)))[text]
        assert float(effects.latents[HOOK][text, position, latent]) == pytest.approx(
            float(expected), rel=1e-8, abs=1e-10
        )
    mean = f.mean((0, 1))
    at_once = lm.ablate(run, loss, "mean", by="latent", only={HOOK: [nodes[0][2], nodes[3][2]]})
    for latent in {nodes[0][2], nodes[3][2]}:
        change = torch.where(f[..., latent] > 0, mean[latent] - f[..., latent], 0)[..., None] * sae.W_dec[latent]
        expected = clean - loss(with_change(gpt2, 1, change, tokens))
        found = at_once.latents[HOOK].to_dense()[:, latent]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    drawn = lm.ablate(run, loss, "resample", only={HOOK: [nodes[0][2]]}, seed=1).latents[HOOK].values()
    assert torch.equal(
        drawn, lm.ablate(run, loss, "resample", only={HOOK: [nodes[0][2]]}, seed=1).latents[HOOK].values()
    )
    assert not torch.equal(drawn, lm.ablate(run, loss, only={HOOK: [nodes[0][2]]}).latents[HOOK].values())


def test_attribution_is_the_gradient_times_the_activation(gpt2, make, tokens):
    first, second = make(reads="blocks.0.resid_post", seed=4), make()
    lm = SaeModel.open(gpt2, [first, second])
    passes = []
    handle = gpt2.register_forward_hook(lambda *_: passes.append(1))
    run = lm.run(tokens)
    scores = lm.attribute(run, loss)
    handle.remove()
    assert len(passes) <= 3
    for layer, sae in ((0, first), (1, second)):
        name = f"blocks.{layer}.resid_post"
        leaf = torch.zeros(*tokens.shape, sae.d_in, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(with_change(gpt2, layer, leaf, tokens)).sum(), leaf)
        expected = run.latents[name].to_dense() * (grad @ sae.W_dec.T)
        torch.testing.assert_close(scores.latents[name].to_dense(), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scores.errors[name], (run.errors[name] * grad).sum(-1), rtol=1e-9, atol=1e-12)
    baseline = torch.linspace(0, 1, 48, dtype=torch.float64)
    shifted = lm.attribute(run, loss, baseline={HOOK: baseline}).latents[HOOK].to_dense()
    f = run.latents[HOOK].to_dense()
    torch.testing.assert_close(shifted, torch.where(f > 0, (f - baseline) * (grad @ second.W_dec.T), 0))


def test_without_errors_gradients_go_through_the_later_saes(gpt2, make, tokens):
    first, second = make("standard", reads="blocks.0.resid_post", seed=4), make("standard")
    lm = SaeModel.open(gpt2, [first, second], error="drop")
    run = lm.run(tokens)
    found = lm.attribute(run, loss).latents["blocks.0.resid_post"].to_dense()
    leaf = run.latents["blocks.0.resid_post"].to_dense().requires_grad_()
    handles = [
        gpt2.transformer.h[0].register_forward_hook(lambda _, __, y: first.decode(leaf)),
        gpt2.transformer.h[1].register_forward_hook(lambda _, __, y: second(y)),
    ]
    (grad,) = torch.autograd.grad(loss(gpt2(input_ids=tokens, use_cache=False).logits).sum(), leaf)
    [handle.remove() for handle in handles]
    torch.testing.assert_close(found, (grad * leaf).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["crosscoder", "cross_layer", "transcoder", "layer_norm", "constant_norm_rescale"])
def test_latents_that_write_elsewhere_are_attributed_by_a_small_change(gpt2, make, make_cross_layer, tokens, kind):
    if kind == "crosscoder":
        sae = make("standard", reads=["blocks.0.resid_post", "blocks.2.resid_post"])
    elif kind == "cross_layer":
        sae = make_cross_layer()
    elif "norm" in kind:
        sae = make("standard", norm=kind)
    else:
        sae = make("transcoder", reads="blocks.2.mlp_in", writes="blocks.2.mlp_out")
    lm = SaeModel.open(gpt2, [sae])
    (name,) = lm.saes
    run = lm.run(tokens)
    scores, step = lm.attribute(run, loss).latents[name], 1e-6
    for text, position, latent in run.latents[name].indices()[:, ::97].T.tolist():
        value = float(run.latents[name][text, position, latent])
        ends = []
        for sign in (1, -1):
            with lm.steer({(name, latent): Clamp(value * (1 + sign * step), where=position)}):
                ends.append(loss(lm.run(tokens[text : text + 1]).logits))
        slope = float((ends[0] - ends[1]) / (2 * step))
        assert float(scores[text, position, latent]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    text, position, latent = run.latents[name].indices()[:, 5].tolist()
    with lm.steer({(name, latent): Ablate(where=position)}):
        without = loss(lm.run(tokens[text : text + 1]).logits)
    effects = lm.ablate(run, loss, only={name: [latent]}).latents[name]
    assert float(effects[text, position, latent]) == pytest.approx(float(loss(run.logits)[text] - without), rel=1e-8)


def test_integrated_gradients_add_up_to_the_ablation_of_each_group(gpt2, make, tokens):
    sae = make()
    lm = SaeModel.open(gpt2, {HOOK: sae})
    run = lm.run(tokens)
    for groups in (1, 3):
        scores = lm.attribute(run, loss, "integrated_gradients", steps=60, groups=groups, seed=2, batch_size=16)
        indices = run.latents[HOOK].indices()
        group = torch.randperm(indices.shape[1], generator=torch.Generator().manual_seed(2)) % groups
        for which in range(groups):
            mine = tuple(indices[:, group == which])
            kept = torch.zeros(run.latents[HOOK].shape, dtype=torch.float64)
            kept[mine] = run.latents[HOOK].to_dense()[mine]
            expected = loss(run.logits) - loss(with_change(gpt2, 1, -kept @ sae.W_dec, tokens))
            found = torch.zeros(2, dtype=torch.float64).index_add_(0, mine[0], scores.latents[HOOK].to_dense()[mine])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_metrics_are_those_of_plain_log_softmax(gpt2, make):
    lm = SaeModel.open(gpt2, {HOOK: make()})
    prompts = [[3, 4, 5, 6, 7], [8, 9, 10]]
    run = lm.run(prompts)
    logits = [gpt2(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts]
    texts = torch.arange(2)
    difference = LogitDifference([1, 2], 3).values(run, run.logits, texts)
    expected = [float(logits[0][-1, 1] - logits[0][-1, 3]), float(logits[1][-1, 2] - logits[1][-1, 3])]
    assert difference.tolist() == pytest.approx(expected)
    assert LogProbability(7).values(run, run.logits, texts).tolist() == pytest.approx(
        [float(each[-1].log_softmax(-1)[7]) for each in logits]
    )
    with lm.steer({(HOOK, 7): Clamp(9.0)}):
        steered = lm.run(prompts)
    kl = KLDivergence().values(run, steered.logits, texts)
    for text, ids in enumerate(prompts):
        p, q = (each[text, : len(ids)].log_softmax(-1) for each in (run.logits, steered.logits))
        assert float(kl[text]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    continued = SaeModel.open(gpt2).run([[3, 4, 5], [8, 9]])
    start = LogProbability(start=2).values(run, run.logits, texts)
    expected = sum(logits[0].log_softmax(-1)[at - 1, prompts[0][at]] for at in (2, 3, 4))
    assert float(start[0]) == pytest.approx(float(expected))
    with pytest.raises(InterventionError, match="needs a continuation"):
        LogProbability().values(continued, continued.logits, texts)


def test_a_metric_that_does_not_fit_is_one_line(gpt2, make, tokens):
    lm = SaeModel.open(gpt2, {HOOK: make()})
    run = lm.run(tokens)
    cases = {
        "has no gradient": lambda: lm.attribute(run, lambda logits: logits.detach()[:, -1, 0]),
        "zero at the clean run": lambda: lm.attribute(run, KLDivergence()),
        "one number for each of the 2 texts": lambda: lm.attribute(run, lambda logits: logits[:, -1]),
        "returned float": lambda: lm.ablate(run, lambda logits: 1.0),
        "the model has 64 from 0": lambda: lm.ablate(run, LogitDifference(70, 1)),
        "names 3 tokens for 2 texts": lambda: lm.ablate(run, LogitDifference([1, 2, 3], 1)),
        "position -11 is outside": lambda: lm.ablate(run, LogitDifference(2, 1, at=-11)),
        "method is 'gradients'": lambda: lm.attribute(run, loss, "gradients"),
        "replacement is 'noise'": lambda: lm.ablate(run, loss, "noise"),
    }
    for match, action in cases.items():
        with pytest.raises(InterventionError, match=match):
            action()


def ranks(values):
    return values.argsort().argsort().double()


def test_attribution_ranks_latents_as_their_ablation_does_on_a_trained_model():
    """The dictionary is made of activations of the model themselves, which reconstructs well without any training."""
    lm = SaeModel.open(MODEL, dtype="float32")
    code = (Path(torch.__file__).parent / "functional.py").read_text()[20_000:24_000]
    hook, ids, gpt2, x = "blocks.2.resid_post", lm.tokenizer(code)["input_ids"], lm.model, []
    handle = gpt2.transformer.h[2].register_forward_hook(lambda _, __, y: x.append(y[:, 1:]))
    rows = torch.tensor(ids[: len(ids) // 100 * 100]).view(-1, 100)
    with torch.no_grad():
        gpt2(input_ids=rows, use_cache=False)
    handle.remove()
    x = torch.cat(x).flatten(0, 1)
    b_dec = x.mean(0)
    W_dec = torch.nn.functional.normalize(x - b_dec, dim=1)[:1000]
    tensors = {"W_enc": W_dec.T.contiguous() / 4, "b_enc": torch.zeros(len(W_dec)), "W_dec": W_dec, "b_dec": b_dec}
    lm = SaeModel.open(gpt2, {hook: Sae("topk", tensors, config={"k": 16})}, tokenizer=lm.tokenizer)
    found = {"gradient": [], "integrated": []}
    for text in ("def read(path):", "import os\nimport", "try:\n    value = int(text)\nexcept", "for i in range("):
        run = lm.run(text)
        metric = LogitDifference(*run.logits[0, -1].topk(2).indices.tolist())
        exact = lm.ablate(run, metric).latents[hook].values()
        for name, method in (("gradient", "attribution_patching"), ("integrated", "integrated_gradients")):
            estimate = lm.attribute(run, metric, method).latents[hook].values()
            rank = torch.corrcoef(torch.stack([ranks(exact), ranks(estimate)]))[0, 1]
            found[name].append((float(rank), float((exact - estimate).norm() / exact.norm())))
    gradient, integrated = (torch.tensor(found[name]).mean(0).tolist() for name in ("gradient", "integrated"))
    assert gradient[0] > 0.9
    assert integrated[0] > gradient[0]
    assert integrated[1] < gradient[1]
