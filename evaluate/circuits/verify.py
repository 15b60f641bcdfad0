"""Check edges by intervention: set a latent to zero, and compare what the graph predicts with what happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .graph import Graph, Node
from .replacement import LocalReplacement, Read


def verify(
    graph: Graph, replacement: LocalReplacement, edges: Sequence[tuple[int, int]], batch_size: int = 32
) -> list[dict[str, Any]]:
    """Set the source of each edge, a latent, to zero; return a row for each edge.

    `direct` is what the edge predicts for its target, and `direct_measured` what happens in the local replacement model
    with all other latents held. `total` is what the graph predicts through all paths (`Graph.total_effects`).
    `total_frozen` is what happens with the model's own MLPs and frozen patterns and norm scales, and `total_measured`
    what happens in the model itself. All are changes of a latent's pre-activation or of a centred logit.
    """
    sources = sorted({source for source, _ in edges})
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for start in range(0, len(sources), batch_size):
        part = sources[start : start + batch_size]
        changes = replacement.change([int(graph.columns[source]) for source in part])
        held, frozen, real = (replacement.respond(changes, what) for what in ("latents", "patterns", "nothing"))
        for row, source in enumerate(part):
            total = graph.total_effects(source)
            for target in (target for other, target in edges if other == source):
                before = _value(graph, replacement, replacement.clean, 0, target)
                rows[source, target] = {
                    "source": source,
                    "target": target,
                    "direct": -float(graph.adjacency[target, source]),
                    "direct_measured": _value(graph, replacement, held, row, target) - before,
                    "total": -float(total[target]),
                    "total_frozen": _value(graph, replacement, frozen, row, target) - before,
                    "total_measured": _value(graph, replacement, real, row, target) - before,
                }
    return [rows[edge] for edge in edges]


def agreement(rows: Sequence[dict[str, Any]], key: str, other: str) -> float | None:
    """Return the correlation of two kinds of effects; None for fewer than three rows, or without spread."""
    predicted, measured = (np.array([row[name] for row in rows]) for name in (key, other))
    if len(rows) < 3 or not predicted.std() or not measured.std():
        return None
    return float(np.corrcoef(predicted, measured)[0, 1])


def _value(graph: Graph, replacement: LocalReplacement, read: Read, row: int, number: int) -> float:
    node: Node = graph.nodes[number]
    if node.kind == "logit":
        return replacement.logit_value(read, row, node.number)
    return replacement.latent_value(read, row, int(graph.columns[number]))
