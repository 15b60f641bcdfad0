"""How much each node and edge of a graph matters to its logits, and which can be left out.

Rows of the adjacency matrix are targets. With the absolute values of each row scaled to a sum of one, `A`, a node's
influence is its share of all paths to the logits, weighted by their probabilities: `p (A + A^2 + ...)`. Influence, the
order in which nodes are found, pruning and both scores are the published method's (Anthropic, "Circuit Tracing", March
2025, appendix on pruning).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float

from ...shared.core.errors import InterventionError

MAX_STEPS = 1000


class Pruned(NamedTuple):
    """The nodes and edges that are kept, and each node's place in the cumulated influence, from 0 to 1."""

    nodes: Bool[np.ndarray, " n"]
    edges: sp.csr_array
    cumulated: Float[np.ndarray, " n"]


class NodeRoles(NamedTuple):
    """Which nodes are latents, errors, token embeddings and logits."""

    latents: Bool[np.ndarray, " n"]
    errors: Bool[np.ndarray, " n"]
    embeddings: Bool[np.ndarray, " n"]
    logits: Bool[np.ndarray, " n"]


def normalized(adjacency: sp.csr_array) -> sp.csr_array:
    """Return absolute values, with rows that sum to one, or to zero if they are empty."""
    sizes = abs(adjacency).astype(np.float64)
    sums = np.asarray(sizes.sum(axis=1)).ravel()
    return sp.csr_array(sp.diags_array(np.divide(1, sums, out=np.zeros_like(sums), where=sums > 0)) @ sizes)


def influence(shares: sp.csr_array, weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return `weights (A + A^2 + ...)`, where `A` is `shares`.

    Raises:
        InterventionError: the graph has a cycle.
    """
    total, step = np.zeros_like(weights), weights
    transposed = sp.csr_array(shares.T)
    for _ in range(MAX_STEPS):
        step = transposed @ step
        if not step.any():
            return total
        total = total + step
    raise InterventionError(
        "the graph has a cycle, so influence does not converge; a latent must only affect later ones"
    )


def scores(adjacency: sp.csr_array, weights: Float[np.ndarray, " n"], roles: NodeRoles) -> tuple[float, float]:
    """Return the replacement and the completeness score, each from 0 to 1.

    The replacement score is the token embeddings' share of the influence that reaches embeddings or errors. The
    completeness score is the share of nodes' inputs that are not errors, each node weighted by its influence.
    """
    shares = normalized(adjacency)
    found = influence(shares, weights)
    tokens, errors = found[roles.embeddings].sum(), found[roles.errors].sum()
    replacement = float(tokens / (tokens + errors)) if tokens + errors > 0 else float("nan")
    total = found + weights
    from_errors = np.asarray(shares[:, roles.errors].sum(axis=1)).ravel()
    return replacement, float(((1 - from_errors) * total).sum() / total.sum())


def prune(
    adjacency: sp.csr_array,
    weights: Float[np.ndarray, " n"],
    roles: NodeRoles,
    node_threshold: float,
    edge_threshold: float,
) -> Pruned:
    """Keep the nodes, then the edges, that make up these shares of all influence, and no dead ends.

    Token embeddings and logits are always kept. A latent is kept only with an edge from and to it, an error only with
    an edge to another node.
    """
    found = influence(normalized(adjacency), weights)
    always = roles.embeddings | roles.logits
    kept = always | _largest(found, node_threshold)
    inside = _between(adjacency, kept)
    shares = normalized(inside)
    through = influence(shares, weights) + weights
    edges = sp.csr_array(sp.diags_array(through) @ shares)
    mask = _largest(edges.data, edge_threshold)
    edges = sp.csr_array((inside.data * mask, inside.indices, inside.indptr), shape=inside.shape)
    edges.eliminate_zeros()
    while True:
        has_inputs = np.diff(edges.indptr) > 0
        has_outputs = np.bincount(edges.indices, minlength=len(weights)) > 0
        left = kept & (always | (has_outputs & (has_inputs | roles.errors)))
        if (left == kept).all():
            break
        kept = left
        edges = _between(edges, kept)
    order = np.argsort(-found, kind="stable")
    cumulated = np.zeros_like(found)
    cumulated[order] = np.cumsum(found[order]) / max(found.sum(), 1e-30)
    return Pruned(kept, edges, cumulated)


def edge_influence(adjacency: sp.csr_array, weights: Float[np.ndarray, " n"]) -> sp.csr_array:
    """Return the share of all influence that flows through each edge."""
    shares = normalized(adjacency)
    return sp.csr_array(sp.diags_array(influence(shares, weights) + weights) @ shares)


def _largest(values: Float[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """Return which values are at least as large as the last one needed for a share of their sum."""
    total = values.sum()
    if total <= 0:
        return np.zeros(len(values), dtype=bool)
    descending = np.sort(values)[::-1]
    last = min(int(np.searchsorted(np.cumsum(descending) / total, share)), len(values) - 1)
    return (values >= descending[last]) & (values > 0)


def _between(adjacency: sp.csr_array, nodes: Bool[np.ndarray, " n"]) -> sp.csr_array:
    """Return the edges whose ends are both among some nodes."""
    keep = sp.diags_array(nodes.astype(adjacency.dtype))
    found = sp.csr_array(keep @ adjacency @ keep)
    found.eliminate_zeros()
    return found
