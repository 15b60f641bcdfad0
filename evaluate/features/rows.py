"""Turn the statistics and contexts that a pass collected into the rows of a feature index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, Int64

from ...shared.store import ActivationStore
from .contexts import BestContexts, window_start
from .files import CONTEXT_TYPE, NEIGHBOUR, TOKEN_EFFECT, nested, struct
from .logits import LogitEffects
from .statistics import N_BINS, ActivationStatistics

_LATENTS_AT_A_TIME = 4096
MAX_NAME_LOOKUPS = 20_000
HIGH_DENSITY = 0.2
HIGH_PEAK = 10.0


class VisitedRows:
    """The tokens, documents and positions of the contexts that were read, in increasing order."""

    def __init__(self, context_size: int):
        self.context_size = context_size
        self._store: ActivationStore | None = None
        self._contexts: list[np.ndarray] = []
        self._parts: dict[str, list[np.ndarray]] = {"token": [], "document": [], "position": []}
        self._joined: dict[str, np.ndarray] = {}

    def add(self, store: ActivationStore, start: int, stop: int) -> None:
        """Record rows [start, stop), which must be whole contexts."""
        self._store = store
        tokens = store.tokens(start, stop)
        assert tokens is not None
        documents, positions = store.documents(start, stop)
        self._contexts.append(np.arange(start, stop, self.context_size) // self.context_size)
        for name, values in (("token", tokens.numpy()), ("document", documents), ("position", positions)):
            self._parts[name].append(np.asarray(values).astype(np.int32 if name == "token" else np.int64))

    @property
    def n_contexts(self) -> int:
        """The number of contexts that were read."""
        return sum(map(len, self._contexts))

    def at(self, name: str, rows: Int64[np.ndarray, "*shape"]) -> np.ndarray:
        """Return the tokens, documents or positions of rows; -1 for row -1."""
        if not self._joined:
            self._joined = {key: np.concatenate(parts) for key, parts in self._parts.items()}
            self._joined["context"] = np.concatenate(self._contexts)
        context = np.searchsorted(self._joined["context"], rows // self.context_size)
        at = context * self.context_size + rows % self.context_size
        return np.where(rows < 0, -1, self._joined[name][at.clip(0, len(self._joined[name]) - 1)])

    def document_names(self, documents: np.ndarray) -> dict[int, str]:
        """Return the names of the documents that have one, or nothing if looking them all up would take too long."""
        store = self._store
        if store is None or len(documents) * len(store.manifest.shards) > MAX_NAME_LOOKUPS:
            return {}
        names = {int(document): store.document_info(int(document))[1] for document in documents}
        return {document: name for document, name in names.items() if name}


class LatentRows:
    """The rows of one SAE's index, one per latent."""

    def __init__(
        self,
        statistics: ActivationStatistics,
        top: BestContexts,
        sampled: BestContexts,
        visited: VisitedRows,
        effects: LogitEffects | None,
        neighbours: tuple[np.ndarray, np.ndarray, np.ndarray],
    ):
        self.statistics, self.visited, self.effects, self.neighbours = statistics, visited, effects, neighbours
        self.top, self.sampled = top, sampled
        self.interestingness = np.concatenate([self._interestingness(part) for part in self._parts()])

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + _LATENTS_AT_A_TIME) for start in range(0, len(self.top.row), _LATENTS_AT_A_TIME))

    def _interestingness(self, part: slice) -> Float[np.ndarray, " latents"]:
        return interestingness(
            self.visited.at("token", self.top.row[part]),
            self.visited.at("document", self.top.row[part]),
            self.statistics.density_of(part),
            None if self.effects is None else self.effects.peak[part],
        )

    def token_ids(self) -> list[int]:
        """Return every token id that the index mentions."""
        effects = [] if self.effects is None else [self.effects.promoted, self.effects.suppressed]
        found = [np.unique(table) for table in effects]
        for best in (self.top, self.sampled):
            found += [
                np.unique(self.visited.at("token", self._window_rows(best, part.start, part.stop)[0]))
                for part in self._parts()
            ]
        return [int(token) for token in np.unique(np.concatenate(found)) if token >= 0]

    def document_ids(self) -> np.ndarray:
        """Return every document that the index mentions."""
        found = [
            np.unique(self.visited.at("document", best.row[part]))
            for best in (self.top, self.sampled)
            for part in self._parts()
        ]
        documents = np.unique(np.concatenate(found))
        return documents[documents >= 0]

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        """Return the columns of latents [start, stop)."""
        part, statistics = slice(start, stop), self.statistics
        n = stop - start
        maximum, end = statistics.maximum[part], np.ldexp(np.float32(1), statistics.exponent[part].clip(-120))
        return {
            "latent": pa.array(np.arange(start, stop)),
            "firings": pa.array(statistics.firings[part]),
            "density": pa.array(statistics.density_of(part)),
            "mean_activation": pa.array(statistics.mean_of(part)),
            "max_activation": pa.array(maximum),
            "interestingness": pa.array(self.interestingness[part]),
            "histogram_end": pa.array(np.where(maximum > 0, end, np.float32(0))),
            "histogram": nested(np.full(n, N_BINS), pa.array(statistics.counts[part].reshape(-1))),
            "top": self._contexts(self.top, start, stop),
            "sampled": self._contexts(self.sampled, start, stop),
            "promoted": self._effects("promoted", part, n),
            "suppressed": self._effects("suppressed", part, n),
            "neighbours": self._neighbours(start, stop),
        }

    def _window_rows(self, best: BestContexts, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        row = best.row[start:stop]
        row = row[row >= 0]
        first = window_start(row, self.visited.context_size, best.window)
        return first[:, None] + np.arange(best.window), row

    def _contexts(self, best: BestContexts, start: int, stop: int) -> pa.Array:
        order = np.argsort(-np.where(best.row[start:stop] >= 0, best.value[start:stop], -np.inf), axis=1, kind="stable")
        row = np.take_along_axis(best.row[start:stop], order, axis=1)
        value = np.take_along_axis(best.value[start:stop], order, axis=1)
        activations = np.take_along_axis(best.activations[start:stop], order[:, :, None], axis=1)
        real = row >= 0
        row, size = row[real], self.visited.context_size
        first = window_start(row, size, best.window)
        columns = {
            "activation": value[real],
            "context": row // size,
            "offset": first % size,
            "document": self.visited.at("document", row),
            "position": self.visited.at("position", row),
            "peak": row - first,
            "tokens": self.visited.at("token", first[:, None] + np.arange(best.window)),
            "activations": activations[real].astype(np.float32),
        }
        return nested(real.sum(axis=1), struct(CONTEXT_TYPE, columns))

    def _effects(self, kind: str, part: slice, n: int) -> pa.Array:
        if self.effects is None:
            return nested(np.zeros(n), pa.array([], TOKEN_EFFECT))
        token = getattr(self.effects, kind)[part]
        effect = getattr(self.effects, f"{kind}_effect")[part]
        values = struct(TOKEN_EFFECT, {"token": token.reshape(-1), "effect": effect.reshape(-1)})
        return nested(np.full(n, token.shape[1]), values)

    def _neighbours(self, start: int, stop: int) -> pa.Array:
        latent, neighbour, score = self.neighbours
        part = slice(*np.searchsorted(latent, [start, stop]))
        counts = np.bincount(latent[part] - start, minlength=stop - start)
        return nested(counts, struct(NEIGHBOUR, {"latent": neighbour[part], "score": score[part]}))


def interestingness(
    peak_tokens: Int[np.ndarray, "d_sae n"],
    documents: Int64[np.ndarray, "d_sae n"],
    density: Float[np.ndarray, " d_sae"],
    logit_peak: Float[np.ndarray, " d_sae"] | None,
) -> Float[np.ndarray, " d_sae"]:
    """Return a score in [0, 1] for sorting latents by how much they are worth looking at; it is a heuristic.

    The score is the product of spread (the number of distinct documents among the top contexts, divided by the number
    of contexts), rarity (1 - density / 0.2, at least 0) and focus. Focus is the share of the top contexts that agree on
    the peak token, averaged, if it is known, with the largest logit effect in units of ten standard deviations, at
    most 1.
    """
    real = peak_tokens >= 0
    n = real.sum(axis=1).clip(1)
    same = (peak_tokens[:, :, None] == peak_tokens[:, None, :]) & real[:, :, None]
    focus = same.sum(axis=1).max(axis=1) / n
    if logit_peak is not None:
        focus = (focus + (logit_peak / HIGH_PEAK).clip(0, 1)) / 2
    keyed = np.sort(np.where(real, documents, np.iinfo(np.int64).max), axis=1)
    distinct = (np.diff(keyed, axis=1, prepend=-2) != 0) & (keyed != np.iinfo(np.int64).max)
    spread = distinct.sum(axis=1) / n
    rarity = (1 - density / HIGH_DENSITY).clip(0, 1)
    return (focus * spread * rarity * real.any(axis=1)).astype(np.float32)
