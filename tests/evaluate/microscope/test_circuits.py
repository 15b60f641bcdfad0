"""The graph of a prompt through a run's transcoders, against the graph that `thresher graph` writes."""

from __future__ import annotations

import json

import pytest
import torch

from thresher.evaluate import EvaluateConfig, evaluate
from thresher.evaluate.circuits.config import GraphConfig
from thresher.evaluate.circuits.run import graph
from thresher.shared.model.language_model import capture, resolve_hook_points
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStoreWriter

PROMPT = "from path import open"


@pytest.fixture(scope="module")
def circuit_run(tiny, speaker, tmp_path_factory):
    """A run of random transcoders of both MLPs of the tiny model."""
    root = tmp_path_factory.mktemp("circuits")
    hooks = [f"blocks.{layer}.mlp_{side}" for layer in range(2) for side in ("in", "out")]
    d = tiny.model.config.n_embd
    rows = capture(tiny.model, torch.from_numpy(tiny.tokens), resolve_hook_points(tiny.model, hooks), truncate=False)
    metadata = {"model": str(speaker), "model_dtype": "float32", "mask_token_ids": [0]}
    with ActivationStoreWriter(
        root / "store",
        dict.fromkeys(hooks, d),
        tiny.tokens.shape[1],
        dtype="float32",
        mask_token_ids=[0],
        metadata=metadata,
    ) as writer:
        writer.append(rows, tokens=tiny.tokens, held_out=tiny.held_out, documents=tiny.documents)
    for layer in range(2):
        generator = torch.Generator().manual_seed(layer)
        W_dec = torch.nn.functional.normalize(torch.randn(24, d, generator=generator), dim=1)
        tensors = {"W_enc": torch.randn(d, 24, generator=generator) / d**0.5, "b_enc": torch.zeros(24)}
        tensors |= {"W_dec": W_dec, "b_dec": torch.zeros(d)}
        Sae(
            "topk_transcoder",
            tensors,
            hook_point=f"blocks.{layer}.mlp_in",
            config={"k": 6},
            metadata={"hook_name_out": f"blocks.{layer}.mlp_out"},
        ).save(root / "saes" / f"layer-{layer}")
    settings = {"store": str(root / "store"), "saes": str(root / "saes"), "model": str(speaker), "bootstrap_samples": 0}
    evaluate(EvaluateConfig(output=str(root / "run" / "evaluation"), **settings))
    return root


@pytest.fixture(scope="module")
def circuits(serve, circuit_run):
    found = serve(run=str(circuit_run / "run"), encoder=False, device="cpu")
    found.client.wait(lambda status: status["model"]["state"] == "ready")
    return found


def test_the_graph_is_that_of_the_command(circuits, circuit_run, speaker, tmp_path):
    assert circuits.client.json("GET", "/api/run")["transcoders"] == ["layer-0", "layer-1"]
    found = circuits.client.json("POST", "/api/graph", {"text": PROMPT})
    settings = {"transcoders": str(circuit_run / "saes"), "text": PROMPT, "device": "cpu", "verify": 0}
    graph(GraphConfig(model=str(speaker), output=str(tmp_path / "graph"), **settings))
    expected = json.loads((tmp_path / "graph" / "graph.json").read_text())
    assert [node["node_id"] for node in found["graph"]["nodes"]] == [node["node_id"] for node in expected["nodes"]]
    weights = {(link["source"], link["target"]): link["weight"] for link in found["graph"]["links"]}
    expected_weights = {(link["source"], link["target"]): link["weight"] for link in expected["links"]}
    assert weights == pytest.approx(expected_weights, rel=1e-4, abs=1e-6)
    assert found["saes"] == {"layer-0": "blocks.0.mlp_in", "layer-1": "blocks.1.mlp_in"}


def test_a_run_without_transcoders_says_what_to_do(scope):
    error = scope.client.json("POST", "/api/graph", {"text": PROMPT}, status=422)["error"]
    assert "no transcoders" in error


def test_the_page_draws_the_graph_and_its_nodes_lead_to_latents(circuits, chromium, expect):
    found = circuits.client.json("POST", "/api/graph", {"text": PROMPT})
    page = chromium.new_page(base_url=f"http://127.0.0.1:{circuits.port}")
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"/#page=circuits&text={PROMPT.replace(' ', '+')}")
    expect(page.locator("#graph g.place")).to_have_count(len(found["graph"]["nodes"]))
    node = next(node for node in found["graph"]["nodes"] if node["activation"] is not None)
    layer, latent, _ = node["node_id"].split("_")
    page.locator(f"g.place[data-node='{node['node_id']}']").dispatch_event("click")
    page.get_by_role("link", name="Look at this latent").click()
    expect(page.locator("#latent-heading")).to_have_text(f"Latent {latent}")
    expect(page.locator("h1")).to_have_text(f"layer-{layer}")
    page.close()
    assert faults == []
