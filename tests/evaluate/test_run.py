"""The whole stage on a small real store: what it writes, and that the figures are those of the activations."""

from __future__ import annotations

import json
import math
import tomllib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from thresher.evaluate.command import main
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStoreWriter

HOOKS = ("blocks.0.resid_post", "blocks.1.resid_post")


@pytest.fixture(scope="module")
def result(tiny, sweep):
    config = EvaluateConfig(
        store=str(tiny.store),
        saes=str(sweep),
        output=str(tiny.root / "evaluation"),
        block_rows=50,
        export=["neuronpedia"],
    )
    return evaluate(config), tiny.root / "evaluation"


def test_metrics_are_those_of_the_activations(tiny, sweep, result):
    metrics, _ = result
    for row in metrics:
        sae = Sae.load(sweep / row["name"])
        x = tiny.activations[row["hook_point"]].numpy()[tiny.usable]
        latents = sae.encode(torch.from_numpy(x)).numpy().astype(np.float64)
        x, x_hat = x.astype(np.float64), latents @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
        mse = ((x - x_hat) ** 2).sum(1).mean()
        assert row["n_rows"] == len(x) == tiny.usable.sum()
        assert row["mse"] == pytest.approx(mse, rel=1e-5)
        assert row["explained_variance"] == pytest.approx(1 - mse / x.var(0).sum(), rel=1e-5)
        assert row["fvu"] == pytest.approx(1 - row["explained_variance"])
        assert row["l0"] == pytest.approx((latents != 0).sum(1).mean())
        assert row["l1"] == pytest.approx(latents.sum(1).mean(), rel=1e-5)
        assert row["dead_fraction"] == pytest.approx((latents == 0).all(0).mean())
        assert sum(row["density_histogram"]["counts"]) == (latents != 0).any(0).sum()


def test_rows_say_what_they_are(tiny, result):
    metrics, _ = result
    assert [row["name"] for row in metrics] == ["standard", "topk_k2", "topk_k10"]
    assert [row["k"] for row in metrics] == [None, 2, 10]
    assert metrics[0]["l1_coefficient"] == 0.5
    assert [row["hook_point"] for row in metrics] == [HOOKS[0], HOOKS[1], HOOKS[1]]
    assert metrics[0]["n_documents"] == 5
    assert metrics[0]["n_contexts"] == tiny.held_out.sum()
    assert "[0]" in metrics[0]["mask"]
    assert "zero" in metrics[0]["ablation"]
    for row in metrics:
        low, high = row["confidence_95"]["explained_variance"]
        assert low < row["explained_variance"] < high
        low, high = row["confidence_95"]["ce_loss_score"]
        assert low < high


def test_splicing_matches_the_model_run_by_hand(tiny, sweep, result):
    metrics, _ = result
    row = next(row for row in metrics if row["name"] == "topk_k10")
    sae = Sae.load(sweep / "topk_k10")
    tokens = torch.from_numpy(tiny.tokens[tiny.held_out])
    usable = torch.from_numpy(tiny.usable[tiny.held_out])
    block = tiny.model.transformer.h[1]
    text = usable[:, :-1] & usable[:, 1:]
    assert text.sum() == row["n_predictions"] < usable[:, :-1].sum()

    def loss(replace):
        def hook(_, __, output):
            return replace(output) if isinstance(output, torch.Tensor) else (replace(output[0]), *output[1:])

        handle = block.register_forward_hook(hook)
        logits = tiny.model(tokens).logits.double()
        handle.remove()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return float(losses[text].mean()), float(losses[usable[:, :-1]].mean())

    runs = [loss(replace) for replace in (lambda x: x, torch.zeros_like)]
    runs.append(loss(lambda x: torch.where(usable[..., None], sae.forward(x), x)))
    for suffix, (clean, zero, spliced) in zip(("", "_saelens"), zip(*runs, strict=True), strict=True):
        assert row[f"ce_clean{suffix}"] == pytest.approx(clean, rel=1e-5)
        assert row[f"ce_zero{suffix}"] == pytest.approx(zero, rel=1e-5)
        assert row[f"ce_sae{suffix}"] == pytest.approx(spliced, rel=1e-5)
        assert row[f"ce_loss_score{suffix}"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)


def test_files(result, sweep):
    metrics, output = result
    written = json.loads((output / "metrics.json").read_text())
    assert written == json.loads(json.dumps(metrics))
    table = pq.read_table(output / "metrics.parquet").to_pylist()
    assert [row["name"] for row in table] == [row["name"] for row in written]
    assert all(math.isclose(a["mse"], b["mse"]) for a, b in zip(table, written, strict=True))
    assert table[0]["density_histogram"] == written[0]["density_histogram"]
    page = (output / "report.html").read_text()
    assert "topk_k10" in page
    assert tomllib.loads((output / "config.toml").read_text())["block_rows"] == 50
    latents = pq.read_table(output / "latents" / "topk_k2.parquet")
    assert latents.num_rows == 32
    assert len(latents["neighbours"][0]) == 5
    np.testing.assert_allclose(latents["encoder_decoder_cosine"], np.ones(32), atol=1e-5)
    (pair,) = pq.read_table(output / "dictionaries.parquet").to_pylist()
    assert (pair["a"], pair["b"], pair["kind"]) == ("topk_k2", "topk_k10", "other")
    assert pair["mean_max_cosine_ab"] > 0.999
    assert not list(output.rglob("*.partial"))
    exported = json.loads((output / "neuronpedia" / "topk_k2" / "batch-0.json").read_text())
    assert (exported["model_id"], exported["layer"], exported["sae_set"]) == ("model", 1, "topk_k2")
    assert "<h1>Sparse autoencoders of model</h1>" in page
    assert "<dt>Store</dt>" in page
    assert f"<dd>{metrics[0]['thresher_version']}</dd>" in page


def test_block_size_and_subsets(tiny, sweep, result, capsys):
    settings = {"store": str(tiny.store), "saes": [str(sweep / "topk_k2")], "model": False, "bootstrap_samples": 0}
    one = evaluate(EvaluateConfig(output=str(tiny.root / "a"), block_rows=1, **settings))[0]
    all_at_once = next(row for row in result[0] if row["name"] == "topk_k2")
    assert one["explained_variance"] == pytest.approx(all_at_once["explained_variance"], rel=1e-7)
    assert one.get("ce_loss_score") is None
    assert one["confidence_95"] is None
    few = evaluate(EvaluateConfig(output=str(tiny.root / "b"), max_rows=30, **settings))[0]
    assert few["n_contexts"] == 2
    table = capsys.readouterr().out
    assert "model    not run" in table
    assert max(map(len, table.splitlines())) <= 100 + len(str(tiny.root))


def test_model_rows_limits_the_model_alone(tiny, sweep):
    settings = {"store": str(tiny.store), "saes": [str(sweep / "topk_k2")], "output": str(tiny.root / "c")}
    row = evaluate(EvaluateConfig(model_rows=30, **settings))[0]
    assert row["n_rows"] == tiny.usable.sum()
    assert 11 <= row["n_model_tokens"] <= 24


def refusal(capsys, *arguments):
    """Run the command, which must fail in one line, and return the line."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_refusals_are_one_line(tiny, sweep, make_sae, tmp_path, capsys):
    def evaluate_with(saes, store=tiny.store, *more):
        return refusal(capsys, "--store", store, "--saes", saes, "--output", tmp_path / "out", *more)

    (tmp_path / "empty").mkdir()
    make_sae(hook_point="blocks.7.mlp_out").save(tmp_path / "hook" / "a")
    make_sae(d_in=8).save(tmp_path / "width")
    assert "no activation store at" in evaluate_with(sweep, tmp_path / "nowhere")
    assert "no SAE folder at" in evaluate_with(tmp_path / "nowhere")
    assert "no SAE in" in evaluate_with(tmp_path / "empty")
    hook = evaluate_with(tmp_path / "hook")
    assert "blocks.7.mlp_out" in hook
    assert HOOKS[1] in hook
    width = evaluate_with(tmp_path / "width")
    assert "width 8" in width
    assert "16" in width
    assert "expected device" in evaluate_with(sweep, tiny.store, "--device", "gpu")
    assert "no model" in evaluate_with(sweep, tiny.store, "--model", tmp_path / "empty").lower()
    export = evaluate_with(sweep, tiny.store, "--export", "neuronpedia", "--feature_rows", 0)
    assert "feature_rows is 0" in export
    (tmp_path / "file").touch()
    blocked = refusal(capsys, "--store", tiny.store, "--saes", sweep, "--output", tmp_path / "file" / "out")
    assert "is a file" in blocked
    assert "did you mean 'saes'" in refusal(capsys, "--store", tiny.store, "--sae", sweep, "--output", tmp_path)
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_to_evaluate_on(sweep, tmp_path, capsys, masked):
    hooks = dict.fromkeys(HOOKS, 16)
    with ActivationStoreWriter(tmp_path / "store", hooks, 4, dtype="float32", mask_token_ids=[3]) as writer:
        batch = {hook: np.zeros((2, 4, 16), dtype=np.float32) for hook in HOOKS}
        writer.append(batch, tokens=np.full((2, 4), 3), held_out=np.array([False, masked]))
    error = refusal(capsys, "--store", tmp_path / "store", "--saes", sweep, "--output", tmp_path / "out")
    assert "every one is masked" in error if masked else "no held-out rows" in error


def test_a_store_without_tokens_is_evaluated_without_metrics_that_need_them(sweep, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(4, 4, 16)).astype(np.float32)
    with ActivationStoreWriter(tmp_path / "store", dict.fromkeys(HOOKS, 16), 4, dtype="float32") as writer:
        writer.append(dict.fromkeys(HOOKS, rows), held_out=np.array([False, True, True, True]))
    arguments = ["--store", tmp_path / "store", "--saes", sweep, "--output", tmp_path / "out"]
    assert "export needs tokens" in refusal(capsys, *arguments, "--export", "neuronpedia")
    assert "probe_tasks needs tokens" in refusal(capsys, *arguments, "--probe_tasks", 2)
    assert "set model = false" in refusal(capsys, *arguments, "--model", "gpt2")
    assert main([str(argument) for argument in arguments]) == 0
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {row["n_rows"] for row in rows} == {12}


@pytest.mark.gpu
def test_cuda_gives_the_same_figures(tiny, sweep, result):
    config = EvaluateConfig(store=str(tiny.store), saes=str(sweep), output=str(tiny.root / "gpu"), device="cuda")
    for ours, expected in zip(evaluate(config), result[0], strict=True):
        for name in ("explained_variance", "cossim", "l0", "l1", "ce_loss_score", "kl_div_score", "dead_fraction"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
