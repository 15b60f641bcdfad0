"""Transcoders and crosscoders through the whole stage, against float64 NumPy and hand-written hooks."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.shared.core.errors import HookPointError, SaeError
from thresher.shared.sae import Sae

HOOKS = ("blocks.0.resid_post", "blocks.1.resid_post")
D, D_SAE = 16, 40


def random_tensors(d_in, d_out, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(D_SAE, d_out, generator=generator) * torch.rand(D_SAE, 1, generator=generator)
    W_dec[:5, : d_out // 2] *= 0.01
    tensors = {"W_enc": 0.3 * torch.randn(d_in, D_SAE, generator=generator), "b_enc": -torch.ones(D_SAE)}
    tensors |= {"W_dec": 0.3 * W_dec, "b_dec": torch.randn(d_out, generator=generator)}
    return tensors | {name: 0.2 * torch.randn(*shape, generator=generator) for name, shape in more.items()}


@pytest.fixture(scope="module")
def result(tiny):
    out = {"hook_name_out": "blocks.1.hook_resid_post"}
    folder = tiny.root / "places"
    tensors = random_tensors(D, D, 1)
    Sae("transcoder", tensors, hook_point=HOOKS[0], metadata=out).save(folder / "transcoder")
    skip = random_tensors(D, D, 2, W_skip=(D, D))
    Sae("skip_transcoder", skip, hook_point=HOOKS[0], metadata=out).save(folder / "skip")
    config = {"hook_points": list(HOOKS), "apply_b_dec_to_input": False}
    tensors = random_tensors(2 * D, 2 * D, 3)
    Sae("crosscoder", tensors, hook_point=HOOKS[0], config=config).save(folder / "crosscoder")
    settings = {"store": str(tiny.store), "output": str(tiny.root / "places-out"), "block_rows": 50, "probe_tasks": 0}
    rows = evaluate(EvaluateConfig(saes=str(folder), **settings))
    return {row["name"]: row for row in rows}, folder, tiny.root / "places-out"


def wide(tiny, hook):
    return tiny.activations[hook].numpy()[tiny.usable].astype(np.float64)


def reconstruct(folder, x):
    sae = Sae.load(folder)
    weights = {name: value.double().numpy() for name, value in sae.named_parameters()}
    latents = np.maximum(x @ weights["W_enc"] + weights["b_enc"], 0)
    x_hat = latents @ weights["W_dec"] + weights["b_dec"]
    return latents, x_hat + x @ weights["W_skip"].T if "W_skip" in weights else x_hat, weights


def check(row, y, y_hat):
    mse = ((y - y_hat) ** 2).sum(axis=1).mean()
    assert row["mse"] == pytest.approx(mse, rel=1e-5)
    assert row["explained_variance"] == pytest.approx(1 - mse / y.var(axis=0).sum(), rel=1e-5)
    assert row["fvu"] == pytest.approx(mse / y.var(axis=0).sum(), rel=1e-5)
    norms = np.linalg.norm(y, axis=1), np.linalg.norm(y_hat, axis=1)
    assert row["cossim"] == pytest.approx(((y * y_hat).sum(axis=1) / (norms[0] * norms[1])).mean(), rel=1e-5)
    assert row["l2_ratio"] == pytest.approx((norms[1] / norms[0]).mean(), rel=1e-5)
    bias = (y_hat**2).sum() / (y * y_hat).sum()
    assert row["relative_reconstruction_bias"] == pytest.approx(bias, rel=1e-4)


@pytest.mark.parametrize("name", ["transcoder", "skip"])
def test_a_transcoder_is_evaluated_at_its_target(tiny, result, name):
    row = result[0][name]
    latents, y_hat, _ = reconstruct(result[1] / name, wide(tiny, HOOKS[0]))
    assert (row["hook_point"], row["target_hook_point"]) == HOOKS
    check(row, wide(tiny, HOOKS[1]), y_hat)
    assert row["l0"] == pytest.approx((latents > 0).sum(axis=1).mean())


def losses_by_hand(tiny, place, x_hat):
    """CE clean, spliced and with zero ablation, where rows `x_hat` (float64) replace one hook point's activations."""
    tokens = torch.from_numpy(tiny.tokens[tiny.held_out])
    usable = torch.from_numpy(tiny.usable[tiny.held_out])
    block = tiny.model.transformer.h[int(place.split(".")[1])]

    def loss(replace):
        def hook(_, __, output):
            first = output if isinstance(output, torch.Tensor) else output[0]
            changed = replace(first.clone())
            return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

        handle = block.register_forward_hook(hook)
        log_probs = tiny.model(tokens).logits.double().log_softmax(-1)
        handle.remove()
        ce = -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        return float(ce[usable[:, :-1] & usable[:, 1:]].mean())

    def splice(x):
        x[usable] = torch.from_numpy(x_hat).float()
        return x

    return loss(lambda x: x), loss(splice), loss(torch.zeros_like)


@pytest.mark.parametrize("name", ["transcoder", "skip"])
def test_a_transcoder_is_spliced_in_at_its_target(tiny, result, name):
    _, y_hat, _ = reconstruct(result[1] / name, wide(tiny, HOOKS[0]))
    clean, spliced, zero = losses_by_hand(tiny, HOOKS[1], y_hat)
    row = result[0][name]
    assert row["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert row["ce_sae"] == pytest.approx(spliced, rel=1e-4)
    assert row["ce_loss_score"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)


def test_a_crosscoder_is_evaluated_at_every_hook_point(tiny, result):
    row = result[0]["crosscoder"]
    x = np.concatenate([wide(tiny, hook) for hook in HOOKS], axis=1)
    latents, x_hat, weights = reconstruct(result[1] / "crosscoder", x)
    assert row["hook_point"] == row["target_hook_point"] == " + ".join(HOOKS)
    check(row, x, x_hat)
    assert row["l0"] == pytest.approx((latents > 0).sum(axis=1).mean())
    assert row["ce_loss_score"] is row["kl_div_score"] is None
    assert "per_hook" in row["model_metrics_note"]
    norms = np.linalg.norm(weights["W_dec"].reshape(D_SAE, 2, D), axis=2)
    writes = norms >= 0.1 * norms.max(axis=1, keepdims=True)
    assert 0 < writes[:, 0].sum() < D_SAE
    shares = norms / norms.sum(axis=1, keepdims=True)
    live = (latents > 0).any(axis=0)
    assert [part["hook_point"] for part in row["per_hook"]] == list(HOOKS)
    for number, part in enumerate(row["per_hook"]):
        columns = slice(number * D, number * D + D)
        check(part, x[:, columns], x_hat[:, columns])
        assert part["l0"] == pytest.approx((latents[:, writes[:, number]] > 0).sum(axis=1).mean())
        assert part["l1"] == pytest.approx((latents @ writes[:, number]).mean(), rel=1e-5)
        assert part["decoder_norm_share"] == pytest.approx(shares[live, number].mean(), rel=1e-5)
        clean, spliced, zero = losses_by_hand(tiny, part["hook_point"], x_hat[:, columns])
        assert part["ce_sae"] == pytest.approx(spliced, rel=1e-4)
        assert part["ce_loss_score"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)
    table = pq.read_table(result[2] / "latents" / "crosscoder.parquet")
    np.testing.assert_allclose(table["decoder_norm_share"].to_pylist(), shares, rtol=1e-5)


def largest(pre_acts, k):
    chosen = np.zeros_like(pre_acts)
    np.put_along_axis(chosen, np.argsort(pre_acts, axis=1)[:, -k:], 1.0, axis=1)
    return chosen * np.maximum(pre_acts, 0)


OTHERS = {
    "topk_skip_transcoder": ((HOOKS[0],), (HOOKS[1],)),
    "jumprelu_transcoder": ((HOOKS[0],), (HOOKS[1],)),
    "topk_crosscoder": (HOOKS, HOOKS),
    "topk_skip_crosscoder": (HOOKS, (HOOKS[1],)),
    "jumprelu_crosscoder": ((HOOKS[0],), HOOKS),
    "gated_crosscoder": (HOOKS, HOOKS[::-1]),
}
"""Kinds whose latents are not chosen by ReLU, with what each reads and writes."""


@pytest.fixture(scope="module")
def others(tiny):
    folder = tiny.root / "other-kinds"
    for seed, (name, (reads, writes)) in enumerate(OTHERS.items()):
        d_in, d_out = D * len(reads), D * len(writes)
        more = {"W_skip": (d_out, d_in)} | {part: (D_SAE,) for part in ("b_gate", "b_mag", "r_mag", "threshold")}
        tensors = random_tensors(d_in, d_out, seed, **more)
        tensors["threshold"] = tensors["threshold"].abs()
        config = {"k": 4, "apply_b_dec_to_input": False}
        metadata = {}
        if name.endswith("crosscoder"):
            config |= {"hook_points": list(reads)} if reads == writes else {"reads": reads, "writes": writes}
        else:
            metadata = {"hook_name_out": writes[0]}
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
        Sae(name, tensors, hook_point=reads[0], config=config, metadata=metadata).save(folder / name)
    settings = {"store": str(tiny.store), "output": str(tiny.root / "other-kinds-out"), "probe_tasks": 0}
    rows = evaluate(EvaluateConfig(saes=str(folder), block_rows=50, **settings))
    return {row["name"]: row for row in rows}, folder


@pytest.mark.parametrize("name", OTHERS)
def test_every_selection_of_latents_is_evaluated_and_spliced_in(tiny, others, name):
    """Offline, at each target, and with the model: what is written is replaced, from what is read."""
    (reads, writes), row = OTHERS[name], others[0][name]
    w = {key: value.double().numpy() for key, value in Sae.load(others[1] / name).named_parameters()}
    x, y = (np.concatenate([wide(tiny, hook) for hook in names], axis=1) for names in (reads, writes))
    linear = x @ w["W_enc"]
    if name.startswith("gated"):
        latents = (linear + w["b_gate"] > 0) * np.maximum(linear * np.exp(w["r_mag"]) + w["b_mag"], 0)
    elif name.startswith("jumprelu"):
        latents = (linear + w["b_enc"] > w["threshold"]) * np.maximum(linear + w["b_enc"], 0)
    else:
        latents = largest(linear + w["b_enc"], 4)
    y_hat = latents @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "skip" in name else 0)
    assert (row["hook_point"], row["target_hook_point"]) == (" + ".join(reads), " + ".join(writes))
    check(row, y, y_hat)
    assert row["l0"] == pytest.approx((latents > 0).sum(axis=1).mean())
    norms = np.linalg.norm(w["W_dec"].reshape(D_SAE, len(writes), D), axis=2)
    reaches = norms >= 0.1 * norms.max(axis=1, keepdims=True)
    parts = row["per_hook"] if len(writes) > 1 else [row]
    for number, (hook, part) in enumerate(zip(writes, parts, strict=True)):
        columns = slice(number * D, number * D + D)
        check(part, y[:, columns], y_hat[:, columns])
        assert part["l0"] == pytest.approx((latents[:, reaches[:, number]] > 0).sum(axis=1).mean())
        clean, spliced, zero = losses_by_hand(tiny, hook, y_hat[:, columns])
        assert part["ce_sae"] == pytest.approx(spliced, rel=1e-4)
        assert part["ce_loss_score"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)


def test_files_of_all_three(tiny, result):
    rows, _, output = result
    assert json.loads((output / "metrics.json").read_text())[0]["name"] == "crosscoder"
    table = {row["name"]: row for row in pq.read_table(output / "metrics.parquet").to_pylist()}
    assert table["skip"]["per_hook"] is None
    assert [part["mse"] for part in table["crosscoder"]["per_hook"]] == pytest.approx(
        [part["mse"] for part in rows["crosscoder"]["per_hook"]]
    )
    features = pq.read_table(output / "features" / "crosscoder.parquet", columns=["firings"])
    x = np.concatenate([tiny.activations[hook].numpy()[tiny.tokens != 0] for hook in HOOKS], axis=1)
    latents, _, _ = reconstruct(result[1] / "crosscoder", x.astype(np.float64))
    assert features["firings"].to_pylist() == (latents > 0).sum(axis=0).tolist()


def test_a_crosscoder_that_does_not_fit_the_store(tiny, tmp_path):
    settings = {"store": str(tiny.store), "output": str(tmp_path / "out"), "model": False}
    for hooks, d, error in (((HOOKS[0], "blocks.7.resid_post"), D, HookPointError), (HOOKS, D + 1, SaeError)):
        config = {"hook_points": list(hooks), "apply_b_dec_to_input": False}
        Sae("crosscoder", random_tensors(2 * d, 2 * d, 0), hook_point=hooks[0], config=config).save(tmp_path / "sae")
        with pytest.raises(error, match=r"blocks\.7|width 34"):
            evaluate(EvaluateConfig(saes=str(tmp_path / "sae"), **settings))
