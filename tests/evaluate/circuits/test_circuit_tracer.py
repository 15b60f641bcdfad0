"""The same effects, scores and kept nodes as circuit-tracer, and its schema, on GPT-2 architecture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from thresher.evaluate.circuits.attribution import attribution_graph
from thresher.evaluate.circuits.influence import prune, scores
from thresher.evaluate.circuits.viewer import viewer_json

from ...tiny_models import LAYERS, build

pytestmark = pytest.mark.peers


def test_the_same_graph(tmp_path, run_peers, make_transcoders):
    model = build("gpt2", n_inner=128)
    model.save_pretrained(tmp_path / "model")
    saes = make_transcoders("transcoder")
    stacked = {name: np.stack([getattr(sae, name).numpy() for sae in saes]) for name in ("W_dec", "b_enc", "b_dec")}
    np.savez(tmp_path / "saes.npz", W_enc=np.stack([sae.W_enc.T.numpy() for sae in saes]), **stacked)
    tokens = torch.randint(1, 60, (8,), generator=torch.Generator().manual_seed(5)).tolist()
    np.save(tmp_path / "tokens.npy", tokens)
    graph, _ = attribution_graph(model, [sae.float() for sae in saes], tokens, skipped=1)
    names = [f"layer {layer}" for layer in range(LAYERS)]
    content = viewer_json(graph, [f"t{token}" for token in tokens], "text", "slug", "scan", names, {})
    (tmp_path / "graph.json").write_text(json.dumps(content))
    script = Path(__file__).with_name("circuit_tracer_graph.py")
    paths = [tmp_path / name for name in ("model", "saes.npz", "tokens.npy", "graph.json", "theirs.npz")]
    run_peers(script, *paths)
    theirs = np.load(tmp_path / "theirs.npz")
    latents = [[node.layer, node.position, node.number] for node in graph.nodes if node.kind == "latent"]
    assert latents == theirs["latents"].tolist()
    assert [node.number for node in graph.nodes if node.kind == "logit"] == theirs["logits"].tolist()
    # It leaves out the MLPs' outputs at the first token, which are errors here.
    first = np.array([node.kind == "error" and node.position == 0 for node in graph.nodes])
    ours = graph.adjacency.toarray()
    assert not theirs["adjacency"][:, first].any()
    scale = np.abs(theirs["adjacency"]).max()
    np.testing.assert_allclose(ours[:, ~first], theirs["adjacency"][:, ~first], atol=1e-5 * scale)
    assert np.abs(ours).max() > 0.1
    theirs_sparse = sp.csr_array(theirs["adjacency"])
    np.testing.assert_allclose(scores(theirs_sparse, graph.weights, graph.roles), theirs["scores"], rtol=1e-4)
    pruned = prune(theirs_sparse, graph.weights, graph.roles, 0.8, 0.98)
    assert 20 < theirs["nodes"].sum() < len(graph.nodes)
    np.testing.assert_array_equal(pruned.nodes, theirs["nodes"])
    np.testing.assert_array_equal(pruned.edges.toarray() != 0, theirs["edges"])
