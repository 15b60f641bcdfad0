"""An attribution graph: nodes, and the direct effect of each on each later one."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from jaxtyping import Float, Int64

from ...shared.core.disk import write_file
from ..results.output import parquet_bytes
from .influence import NodeRoles, Pruned, edge_influence, prune, scores

NODE_KINDS = ("latent", "error", "embedding", "logit")
NodeKind = Literal["latent", "error", "embedding", "logit"]


class Node(NamedTuple):
    """A node: its kind, layer, position, and number.

    The layer of an embedding is -1, that of a logit the number of layers. The number is that of a latent in its layer,
    or a token's id; that of an error is -1. `value` is a latent's activation or a logit's probability.
    """

    kind: NodeKind
    layer: int
    position: int
    number: int
    value: float | None


@dataclass
class Graph:
    """Direct effects in the local replacement model of a prompt.

    Attributes:
        nodes: latents by layer and position, errors, embeddings, and logits from the likeliest on.
        adjacency: `[target, source]`, what a source adds to a latent's pre-activation or to a centred logit.
        tokens: token ids of the prompt.
        constants: what biases and position embeddings add to each target; NaN for a node without inputs.
        gap: the largest difference between a target's value and the sum of its direct effects and its constant,
            relative to the sum of their sizes.
        logit_gap: the largest difference between the model's logits and the replacement's.
        n_active: active latents, of which those of most influence are nodes.
        n_backward: backward passes.
        seconds: wall-clock time.
    """

    nodes: list[Node]
    adjacency: sp.csr_array
    tokens: list[int]
    n_layers: int
    constants: Float[np.ndarray, " n"]
    gap: float
    logit_gap: float
    n_active: int
    n_backward: int
    seconds: float
    columns: Int64[np.ndarray, " latents"]
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    pruned: Pruned = field(init=False)
    replacement_score: float = field(init=False)
    completeness_score: float = field(init=False)

    def __post_init__(self) -> None:
        """Score and prune."""
        self.replacement_score, self.completeness_score = scores(self.adjacency, self.weights, self.roles)
        self.pruned = prune(self.adjacency, self.weights, self.roles, self.node_threshold, self.edge_threshold)

    @property
    def roles(self) -> NodeRoles:
        """Which nodes are of which kind."""
        kinds = np.array([node.kind for node in self.nodes])
        return NodeRoles(*(kinds == kind for kind in NODE_KINDS))

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """The probability of each logit; zero for other nodes."""
        return np.array([node.value if node.kind == "logit" and node.value else 0.0 for node in self.nodes])

    def strongest_edges(self, n: int, sources: NodeKind = "latent") -> list[tuple[int, int]]:
        """Return the kept edges of most influence from nodes of a kind, as pairs of a source and a target."""
        edges = edge_influence(self.pruned.edges, self.weights).tocoo()
        mine = np.array([self.nodes[source].kind == sources for source in edges.col], dtype=bool)
        order = np.argsort(edges.data[mine], kind="stable")[::-1][:n]
        return list(zip(edges.col[mine][order].tolist(), edges.row[mine][order].tolist(), strict=True))

    def total_effects(self, source: int) -> Float[np.ndarray, " n"]:
        """Return what a source adds to every later node through all paths, if latents follow their pre-activations.

        A latent's path goes on with the share of its activation that changes: no latent is switched on or off.
        """
        values = np.array([node.value if node.kind == "latent" else np.inf for node in self.nodes], dtype=float)
        per_unit = sp.csr_array(self.adjacency @ sp.diags_array(1 / values))
        step = np.asarray(self.adjacency[:, [source]].todense()).ravel().astype(np.float64)
        total = np.zeros_like(step)
        while step.any():
            total += step
            step = per_unit @ step
        return total

    def table(self) -> list[dict[str, Any]]:
        """Return one row per node, in the order of the adjacency's rows and columns."""
        rows = []
        for number, node in enumerate(self.nodes):
            kept = {"influence": float(self.pruned.cumulated[number]), "kept": bool(self.pruned.nodes[number])}
            rows.append({"node": number, **node._asdict(), **kept})
        return rows

    def summary(self) -> dict[str, Any]:
        """Return scores, counts and checks."""
        return {
            "replacement_score": self.replacement_score,
            "completeness_score": self.completeness_score,
            "tokens": len(self.tokens),
            "active_latents": self.n_active,
            "latent_nodes": int(self.roles.latents.sum()),
            "edges": int(self.adjacency.nnz),
            "kept_nodes": int(self.pruned.nodes.sum()),
            "kept_edges": int(self.pruned.edges.nnz),
            "node_threshold": self.node_threshold,
            "edge_threshold": self.edge_threshold,
            "gap": self.gap,
            "logit_gap": self.logit_gap,
            "backward_passes": self.n_backward,
            "seconds": round(self.seconds, 3),
        }

    def save(self, folder: Path) -> None:
        """Write `adjacency.npz` (SciPy's sparse format, all edges) and `nodes.parquet` (a row per row and column)."""
        buffer = io.BytesIO()
        sp.save_npz(buffer, self.adjacency)
        write_file(folder / "adjacency.npz", buffer.getvalue())
        write_file(folder / "nodes.parquet", parquet_bytes(pa.Table.from_pylist(self.table())))
