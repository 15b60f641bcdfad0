"""`thresher graph` on the bundled model with trained transcoders: what it writes, and what ablation of latents does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch

from thresher import HarvestConfig, Sae, TrainConfig, harvest, train
from thresher.evaluate.circuits import graph_command
from thresher.evaluate.circuits.attribution import attribution_graph
from thresher.shared.model.language_model import load_model, load_tokenizer

MODEL = Path(__file__).parents[3] / "models" / "stdlib-lm"
TEXT = "import os\n\ndef read(path):\n    with open(path) as"
LAYERS = range(4)
KINDS = {"latent": "cross layer transcoder", "error": "mlp reconstruction error"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of small trained transcoders, one for each MLP."""
    root = tmp_path_factory.mktemp("transcoders")
    names = [f"blocks.{layer}.mlp_{side}" for layer in LAYERS for side in ("in", "out")]
    harvest(
        HarvestConfig(
            model=str(MODEL), dataset="python-stdlib", hook_points=names, tokens=49_152, store=str(root / "store")
        )
    )
    tables = [
        {"name": f"layer-{layer}", "architecture": "topk", "d_sae": 512, "k": 16, "lr": 5e-3, "skip": True}
        | {"reads": f"blocks.{layer}.mlp_in", "writes": f"blocks.{layer}.mlp_out"}
        for layer in LAYERS
    ]
    train(
        TrainConfig(store=str(root / "store"), output=str(root / "saes"), sae=tables, batch_size=512, warmup_steps=10)
    )
    return root / "saes"


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The output of the command."""
    output = tmp_path_factory.mktemp("graph") / "read"
    arguments = ["--model", str(MODEL), "--transcoders", str(folder), "--text", TEXT, "--output", str(output)]
    assert graph_command.main([*arguments, "--device", "cpu", "--verify", "8"]) == 0
    return output


def test_what_is_written_belongs_together(written):
    content = json.loads((written / "graph.json").read_text())
    nodes = pq.read_table(written / "nodes.parquet").to_pylist()
    adjacency = sp.load_npz(written / "adjacency.npz").toarray()
    summary = json.loads((written / "summary.json").read_text())
    assert adjacency.shape == (len(nodes), len(nodes))
    assert not np.diag(adjacency).any()
    kept = [row for row in nodes if row["kept"]]
    assert [(n["ctx_idx"], n["influence"]) for n in content["nodes"] if n["feature_type"] in KINDS.values()] == [
        (row["position"], row["influence"]) for row in kept if row["kind"] in KINDS
    ]
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(set(ids)) == len(ids) == len(kept) == summary["kept_nodes"]
    place = dict(zip(ids, (row["node"] for row in kept), strict=True))
    for link in content["links"]:
        assert link["weight"] == pytest.approx(adjacency[place[link["target"]], place[link["source"]]])
    assert "".join(content["metadata"]["prompt_tokens"]) == "<|endoftext|>" + TEXT
    page = (written / "graph.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [node["node_id"] for node in data["graph"]["nodes"]] == ids
    assert summary["missing_layers"] == []
    assert summary["gap"] < 1e-5
    assert summary["logit_gap"] < 1e-3


def test_pruning_and_scores_are_those_of_dense_algebra(written):
    nodes = pq.read_table(written / "nodes.parquet").to_pylist()
    A = np.abs(sp.load_npz(written / "adjacency.npz").toarray()).astype(float)
    summary = json.loads((written / "summary.json").read_text())
    A /= np.maximum(A.sum(1, keepdims=True), 1e-30)
    kinds = np.array([row["kind"] for row in nodes])
    p = np.where(kinds == "logit", [row["value"] or 0 for row in nodes], 0)
    influence = p @ (np.linalg.inv(np.eye(len(A)) - A) - np.eye(len(A)))
    tokens, errors = influence[kinds == "embedding"].sum(), influence[kinds == "error"].sum()
    assert summary["replacement_score"] == pytest.approx(tokens / (tokens + errors))
    from_errors = A[:, kinds == "error"].sum(1)
    weights = influence + p
    assert summary["completeness_score"] == pytest.approx(((1 - from_errors) * weights).sum() / weights.sum())
    order = np.argsort(-influence)
    cumulated = np.cumsum(influence[order]) / influence.sum()
    np.testing.assert_allclose([nodes[i]["influence"] for i in order], cumulated, atol=1e-9)
    for i, row in enumerate(nodes):
        if row["kept"] and row["kind"] in KINDS:
            assert row["influence"] - influence[i] / influence.sum() < 0.8


def test_ablating_the_latents_does_what_the_graph_predicts(folder, written):
    rows = pq.read_table(written / "verified.parquet").to_pylist()
    assert len(rows) == 8
    for row in rows:
        assert row["direct_measured"] == pytest.approx(row["direct"], rel=1e-3, abs=1e-4)
    model, tokenizer = load_model(str(MODEL), "float32"), load_tokenizer(str(MODEL))
    saes = [Sae.load(folder / f"layer-{layer}") for layer in LAYERS]
    tokens = [0, *tokenizer(TEXT)["input_ids"]]
    graph, replacement = attribution_graph(model, saes, tokens, skipped=1)
    latents = [i for i, node in enumerate(graph.nodes) if node.kind == "latent"]
    first, second = [i for i, node in enumerate(graph.nodes) if node.kind == "logit"][:2]
    totals = {latent: graph.total_effects(latent) for latent in latents}
    top = sorted(latents, key=lambda latent: -abs(totals[latent][first]))[:16]
    changed = replacement.respond(replacement.change([int(graph.columns[latent]) for latent in top]), "patterns")
    token, other = graph.nodes[first].number, graph.nodes[second].number
    clean = replacement.logit_value(replacement.clean, 0, token)
    measured = np.array([clean - replacement.logit_value(changed, row, token) for row in range(len(top))])
    predicted = np.array([totals[latent][first] for latent in top])
    assert (np.sign(measured) == np.sign(predicted)).sum() >= 15
    assert np.corrcoef(measured, predicted)[0, 1] > 0.7
    # In the model itself the last norm rescales all logits, which the difference of two hardly feels.
    top = sorted(latents, key=lambda latent: -abs(totals[latent][first] - totals[latent][second]))[:16]
    predicted = np.array([totals[latent][first] - totals[latent][second] for latent in top])
    differences = [plain_difference(model, tokens, None, token, other)]
    for latent in top:
        node = graph.nodes[latent]
        written_there = node.value * saes[node.layer].W_dec[node.number]
        differences.append(plain_difference(model, tokens, (node.layer, node.position, written_there), token, other))
    measured = differences[0] - np.array(differences[1:])
    assert (np.sign(measured) == np.sign(predicted)).sum() >= 13
    assert np.corrcoef(measured, predicted)[0, 1] > 0.5


@torch.no_grad()
def plain_difference(model, tokens, ablated, token, other):
    """Return the difference of two logits with a vector taken from an MLP's output, by a plain hook."""
    handles = []
    if ablated is not None:
        layer, position, vector = ablated

        def take(_, __, output):
            output = output.clone()
            output[0, position] -= vector
            return output

        handles.append(model.transformer.h[layer].mlp.register_forward_hook(take))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return float(logits[token] - logits[other])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "x = 1\n" * 200], "longer than the model's context of 256"),
        (["--text", ""], "text"),
        (["--text", "import", "--transcoders", "nowhere"], "nowhere"),
        (["--text", "import", "--node_threshold", "1.5"], "node_threshold"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys, arguments, expected):
    output = tmp_path / "out"
    common = ["--model", str(MODEL), "--transcoders", str(folder), "--device", "cpu", "--output", str(output)]
    assert graph_command.main([*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not output.exists()
