"""The attribution graph of a prompt through the transcoders of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...circuits.attribution import GraphSettings, attribution_graph
from ...circuits.run import graph_content
from .loaded import LoadedModel
from .worker import Job

MOST_NODES = 2048


def trace_prompt(
    lm: LoadedModel, job: Job, text: str, tokens: Sequence[int], names: Sequence[str], model_name: str
) -> dict[str, Any]:
    """Return the graph of a prompt's next token in the viewers' schema, with its scores and the number of layers.

    Raises:
        InterventionError, ModelError, SaeError, HookPointError: those of `attribution_graph`.
    """
    job.check()
    saes = [lm.shelf.get(name) for name in names]
    skipped = int(not lm.usable_first(tokens))
    settings = GraphSettings(max_nodes=MOST_NODES)
    found, replacement = attribution_graph(lm.model, saes, tokens, settings, skipped=skipped)
    content, _, _ = graph_content(found, replacement, lm.model, lm.tokenizer, text, "prompt", model_name, names)
    return {"graph": content, "n_layers": found.n_layers, "summary": found.summary() | {"verified": []}}
