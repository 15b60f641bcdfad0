"""Make the attribution graph of a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ...shared.core.errors import InterventionError, ModelError
from ...shared.core.terminal.progress import progress
from ...shared.sae import Sae
from .graph import Graph, Node
from .influence import influence, normalized
from .replacement import LocalReplacement
from .transcoders import wire

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_GAP = {torch.float64: 1e-6}
"""Largest gap between a target and the sum of its effects that is rounding; 1e-3 in other types."""
REFRESH = 4
"""Batches of latents between two rankings by influence."""


@dataclass(frozen=True)
class GraphSettings:
    """How many nodes are found, and which of them are kept.

    Attributes:
        max_nodes: most latents that are nodes, those of most influence first.
        max_logits: most logits.
        logit_mass: probability that the logits make up, if that takes no more than `max_logits`.
        node_threshold: share of all influence that the kept nodes make up.
        edge_threshold: the same of edges.
        batch_size: targets of one backward pass.
    """

    max_nodes: int = 4096
    max_logits: int = 10
    logit_mass: float = 0.95
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    batch_size: int = 64


def attribution_graph(
    model: PreTrainedModel,
    transcoders: Iterable[Sae],
    tokens: Sequence[int],
    settings: GraphSettings | None = None,
    *,
    skipped: int = 0,
) -> tuple[Graph, LocalReplacement]:
    """Return the graph of a prompt's next token, and the local replacement model that it describes.

    Args:
        model: a causal language model, in float32 or float64.
        transcoders: one for each MLP, or for some: others are error nodes. Or one cross-layer transcoder.
        tokens: of the prompt.
        settings: by default the published ones.
        skipped: tokens at the start, such as BOS, that the transcoders were not trained on: errors alone.

    Raises:
        InterventionError: there are no tokens that transcoders read, or no transcoders.
        ModelError: the model is not linear with frozen patterns and scales, or is of a narrower type.
        SaeError: transcoders do not fit.
        HookPointError: MLPs' inputs or outputs are not found.
    """
    settings = settings or GraphSettings()
    start = time.perf_counter()
    saes = list(transcoders)
    if not saes or len(tokens) <= skipped:
        raise InterventionError(
            f"a graph needs a transcoder and a text, got {len(saes)} and {len(tokens) - skipped} tokens"
        )
    dtype = model.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ModelError(f"the model is in {str(dtype).removeprefix('torch.')}; expected float32 or float64")
    wired = wire(model, saes)
    ids = torch.tensor(list(tokens), device=model.device)
    replacement = LocalReplacement(model, wired, ids, skipped)
    logits, probabilities = salient_logits(replacement.logits, settings.max_logits, settings.logit_mass)
    replacement.prepare(min(settings.batch_size, max(len(replacement.latents), len(logits))))
    rows = _Rows(replacement, logits, probabilities)
    rows.find(settings)
    graph = rows.graph(settings, start)
    return graph, replacement


def salient_logits(
    logits: Float[Tensor, " vocabulary"], most: int, mass: float
) -> tuple[list[int], Float[np.ndarray, " n"]]:
    """Return the likeliest tokens, as few as make up a probability, and their probabilities."""
    p = logits.double().softmax(dim=0)
    top = p.topk(min(most, len(p)))
    n = int((top.values.cumsum(0) < mass).sum()) + 1
    return top.indices[:n].tolist(), top.values[:n].cpu().numpy()


class _Rows:
    """Rows of the adjacency matrix, of targets in the order in which they were found: logits, then latents."""

    def __init__(self, replacement: LocalReplacement, logits: list[int], probabilities: Float[np.ndarray, " n"]):
        self.replacement, self.logits, self.probabilities = replacement, logits, probabilities
        self.rows: list[sp.csr_array] = []
        self.found: list[int] = []
        self.n_latents = len(replacement.latents)

    def find(self, settings: GraphSettings) -> None:
        """Find the rows of the logits, then of the latents of most influence."""
        batch = settings.batch_size
        for start in range(0, len(self.logits), batch):
            self._keep(self.replacement.logit_effects(self.logits[start : start + batch]))
        n = min(settings.max_nodes, self.n_latents)
        with progress(total=n, desc="graph", unit="latent") as bar:
            while len(self.found) < n:
                pending = self._next(n, batch)
                for start in range(0, len(pending), batch):
                    some = pending[start : start + batch]
                    self._keep(self.replacement.latent_effects(some))
                    self.found += some
                    bar.update(len(some))

    def _keep(self, effects: Float[Tensor, "targets sources"]) -> None:
        self.rows.append(sp.csr_array(effects.detach().cpu().numpy()))

    def _next(self, n: int, batch: int) -> list[int]:
        """Return the next latents: all, from the last layer back, or those of most influence so far."""
        if n == self.n_latents:
            return self.replacement.latents.layer.argsort(stable=True).tolist()
        rows = sp.csr_array(sp.vstack(self.rows))
        n_logits, n_sources = len(self.logits), self.replacement.n_sources
        square = self._square(rows, np.arange(n_sources))
        weights = np.zeros(n_sources + n_logits)
        weights[n_sources : n_sources + n_logits] = self.probabilities
        ranked = np.argsort(-influence(normalized(square), weights)[: self.n_latents], kind="stable")
        fresh = ranked[~np.isin(ranked, self.found)]
        some = fresh[: min(REFRESH * batch, n - len(self.found))]
        return some[np.argsort(self.replacement.latents.layer.cpu().numpy()[some], kind="stable")].tolist()

    def _square(self, rows: sp.csr_array, sources: Int64[np.ndarray, " n"]) -> sp.csr_array:
        """Return rows as a square matrix over some sources, with the logits last."""
        n_logits = len(self.logits)
        size = len(sources) + n_logits
        place = np.full(self.replacement.n_sources, -1)
        place[sources] = np.arange(len(sources))
        targets = np.concatenate([len(sources) + np.arange(n_logits), place[self.found]]).astype(np.int64)
        picked = rows[:, sources].tocoo()
        return sp.csr_array((picked.data, (targets[picked.row], picked.col)), shape=(size, size))

    def graph(self, settings: GraphSettings, start: float) -> Graph:
        """Return the graph of the latents found."""
        replacement = self.replacement
        rows = sp.csr_array(sp.vstack(self.rows))
        constants, gap = self._check(rows)
        columns = np.array(sorted(self.found), dtype=np.int64)
        sources = np.concatenate([columns, np.arange(self.n_latents, replacement.n_sources)])
        adjacency = self._square(rows, sources)
        order = np.concatenate([len(sources) + np.arange(len(self.logits)), np.searchsorted(columns, self.found)])
        all_constants = np.full(len(sources) + len(self.logits), np.nan)
        all_constants[order.astype(np.int64)] = constants
        return Graph(
            nodes=self._nodes(columns),
            adjacency=adjacency,
            tokens=replacement.tokens.tolist(),
            n_layers=replacement.n_layers,
            constants=all_constants,
            gap=gap,
            logit_gap=replacement.logit_gap,
            n_active=self.n_latents,
            n_backward=replacement.n_backward,
            seconds=time.perf_counter() - start,
            columns=columns,
            node_threshold=settings.node_threshold,
            edge_threshold=settings.edge_threshold,
        )

    def _check(self, rows: sp.csr_array) -> tuple[Float[np.ndarray, " targets"], float]:
        """Return what each target is without sources, and how far its effects are from making up the rest."""
        replacement = self.replacement
        nothing = replacement.without_sources()
        values, constants = (
            [replacement.logit_value(read, 0, token) for token in self.logits]
            + [replacement.latent_value(read, 0, column) for column in self.found]
            for read in (replacement.clean, nothing)
        )
        value, constant = np.array(values), np.array(constants)
        sums = np.asarray(rows.sum(axis=1)).ravel().astype(np.float64)
        sizes = np.asarray(abs(rows).sum(axis=1)).ravel() + np.abs(constant) + np.abs(value)
        gaps = np.abs(value - constant - sums) / np.maximum(sizes, 1e-30)
        gap = float(gaps.max(initial=0.0))
        if not gap <= MOST_GAP.get(replacement.dtype, 1e-3):
            raise ModelError(
                f"{type(replacement.model).__name__} is not linear between its MLPs even with attention patterns and "
                f"norm scales frozen: direct effects miss {gap:.1%} of a target; no graph can be made of it"
            )
        return constant, gap

    def _nodes(self, columns: Int64[np.ndarray, " n"]) -> list[Node]:
        replacement, latents = self.replacement, self.replacement.latents
        chosen = [column[columns].tolist() for column in latents]
        nodes = [Node("latent", layer, at, number, value) for layer, at, number, value in zip(*chosen, strict=True)]
        context = range(replacement.context)
        nodes += [Node("error", layer, at, -1, None) for layer in range(replacement.n_layers) for at in context]
        nodes += [Node("embedding", -1, at, int(replacement.tokens[at]), None) for at in context]
        last = replacement.context - 1
        pairs = zip(self.logits, self.probabilities.tolist(), strict=True)
        return nodes + [Node("logit", replacement.n_layers, last, token, p) for token, p in pairs]
