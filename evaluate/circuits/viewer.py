"""A graph in the JSON schema of circuit-tracer's and Neuronpedia's viewers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .graph import Graph, Node

_TYPES = {
    "latent": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}
"""What the schema calls each kind; per-layer transcoders have no name of their own in it."""


def node_id(node: Node) -> str:
    """Return a node's name, unique in its graph.

    As in circuit-tracer, except for errors: its `0_LAYER_POSITION` is also the name of a latent of layer 0.
    """
    if node.kind == "embedding":
        return f"E_{node.number}_{node.position}"
    if node.kind == "error":
        return f"{node.layer}_error_{node.position}"
    return f"{node.layer + (node.kind == 'logit')}_{node.number}_{node.position}"


def viewer_json(
    graph: Graph,
    texts: Sequence[str],
    prompt: str,
    slug: str,
    scan: str,
    transcoders: Sequence[str],
    labels: Mapping[int, str],
) -> dict[str, Any]:
    """Return the kept nodes and edges in the schema.

    `texts` are the tokens', and `labels` those of nodes by number; the viewers read a logit's text and probability from
    its label.
    """
    kept = graph.pruned.nodes.nonzero()[0].tolist()
    edges = graph.pruned.edges.tocoo()
    links = zip(edges.col.tolist(), edges.row.tolist(), edges.data.tolist(), strict=True)
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": list(transcoders),
            "prompt_tokens": list(texts),
            "prompt": prompt,
            "node_threshold": graph.node_threshold,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(graph, number, labels.get(number, "")) for number in kept],
        "links": [
            {"source": node_id(graph.nodes[source]), "target": node_id(graph.nodes[target]), "weight": float(weight)}
            for source, target, weight in links
        ],
    }


def _node(graph: Graph, number: int, label: str) -> dict[str, Any]:
    node = graph.nodes[number]
    name = node_id(node)
    first_logit = len(graph.nodes) - int(graph.roles.logits.sum())
    layer = "E" if node.kind == "embedding" else str(node.layer + (node.kind == "logit"))
    return {
        "node_id": name,
        "feature": {"error": -1, "embedding": node.position, "logit": node.number}.get(node.kind, _paired(node)),
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "token_prob": node.value if node.kind == "logit" else 0.0,
        "is_target_logit": number == first_logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{name.rpartition('_')[0]}-{node.position if node.kind in ('embedding', 'logit') else 0}",
        "clerp": label,
        "influence": None if node.kind == "logit" else float(graph.pruned.cumulated[number]),
        "activation": node.value if node.kind == "latent" else None,
    }


def _paired(node: Node) -> int:
    """Return a latent's layer and number as one integer, by Cantor's pairing function, as the viewers expect."""
    total = node.layer + node.number
    return total * (total + 1) // 2 + node.number
