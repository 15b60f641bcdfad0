# ruff: noqa: E402
"""Make a graph with circuit-tracer, or read one in its schema; run by the peers' interpreter.

usage: circuit_tracer_graph.py MODEL_FOLDER TRANSCODERS.npz TOKENS.npy GRAPH.json OUTPUT.npz
"""

import json
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import torch

huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False  # circuit-tracer 0.5 imports it; newer hubs lack it
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.frontend.graph_models import Model, Node
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

sys.path.append(str(Path(__file__).parents[2]))
from hooked_gpt2 import hooked_gpt2

folder, weights, tokens, graph_json, output = sys.argv[1:]
content = json.loads(Path(graph_json).read_text())
model = Model.model_validate(content)
assert [node.model_dump() for node in model.nodes] == content["nodes"]
for node in model.nodes:
    layer, number, position = node.node_id.split("_")
    if node.feature_type == "cross layer transcoder":
        theirs = Node.feature_node(int(layer), int(position), int(number), node.influence, node.activation)
        assert theirs.model_dump() == node.model_dump() | {"clerp": ""}

weights, layers = np.load(weights), {}
for layer in range(len(weights["b_dec"])):
    d_sae, d = weights["W_dec"][layer].shape
    one = SingleLayerTranscoder(d, d_sae, torch.relu, layer, device="cpu", dtype=torch.float32)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(one, name).data = torch.from_numpy(weights[name][layer]).float()
    layers[layer] = one
transcoders = TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out", scan="test")


class Numbers:
    """A tokenizer whose tokens are written as their numbers."""

    padding_side = "right"
    vocab_size = 64

    def decode(self, tokens, **_):
        """Return the numbers of some tokens."""
        return str(tokens)


replacement = hooked_gpt2(TransformerLensReplacementModel, folder)
replacement._configure_replacement_model(transcoders)
ids = torch.from_numpy(np.load(tokens))
replacement.ensure_tokenized = lambda _: ids
replacement.tokenizer = Numbers()
graph = attribute(ids, replacement, batch_size=16)
pruned = prune_graph(graph)
np.savez(
    output,
    latents=graph.active_features[graph.selected_features].numpy(),
    adjacency=graph.adjacency_matrix.numpy(),
    logits=graph.logit_token_ids.numpy(),
    scores=np.array(compute_graph_scores(graph)),
    nodes=pruned.node_mask.numpy(),
    edges=pruned.edge_mask.numpy(),
)
