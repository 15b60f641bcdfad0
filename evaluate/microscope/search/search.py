"""Search latents by words and by meaning, and rank both together."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..data.latents import LatentTables
from .full_text import match_words
from .prepare import Preparation

RANK_OFFSET = 60
"""Of reciprocal rank fusion: a place r in a ranking counts 1 / (60 + r) (Cormack, Clarke and Büttcher, 2009)."""
DEPTH = 200
LatentKey = tuple[str, int]


class LatentSearch:
    """The search over all SAEs of a run. Methods may be called from several threads."""

    def __init__(self, tables: LatentTables, preparation: Preparation):
        self._tables, self._preparation = tables, preparation
        self._lock = threading.Lock()
        self._embedded = lru_cache(maxsize=256)(self._embed)

    def search(self, query: str, saes: Sequence[str] | None = None, limit: int = 40) -> dict[str, Any]:
        """Return the latents that match a query, the best first, with their places in both rankings.

        `complete` says whether all latents could be searched both ways yet, and `note` why they cannot.

        Raises:
            MissingFileError: there is no such SAE.
        """
        names = list(saes or self._tables.run.indexes)
        for name in names:
            self._tables.index(name)
        state = self._preparation.state
        words = self._by_words(query, names)
        meaning = self._by_meaning(query, names)
        chosen = fuse([words, meaning])[:limit]
        listed = self._listed([key for key, _ in chosen])
        results = []
        for key, score in chosen:
            places = {"words": _place(words, key), "meaning": _place(meaning, key)}
            cosine = meaning.get(key)
            row = {"sae": key[0], "score": round(score, 6), "places": places, "cosine": cosine and round(cosine, 4)}
            results.append(row | listed[key])
        note = state.note
        if state.words < 1:
            note = f"still reading the indexes: {100 * state.words:.0f}%"
        elif not note and state.meaning < 1:
            note = f"meaning is searched in {100 * state.meaning:.0f}% of the latents so far"
        complete = state.words == 1 and state.meaning == 1
        return {"query": query, "results": results, "complete": complete, "encoder": state.encoder, "note": note}

    def _by_words(self, query: str, names: Iterable[str]) -> dict[LatentKey, float]:
        ready = self._preparation.state.ready
        found = {
            (name, latent): score
            for name in names
            if name in ready
            for latent, score in match_words(ready[name], query, DEPTH)
        }
        return _largest(found, DEPTH)

    def _by_meaning(self, query: str, names: Iterable[str]) -> dict[LatentKey, float]:
        vectors = self._preparation.state.vectors
        there = [name for name in names if name in vectors]
        if not there or not query.strip():
            return {}
        embedded = self._embedded(query)
        found = {(name, latent): cosine for name in there for latent, cosine in vectors[name].nearest(embedded, DEPTH)}
        return _largest(found, DEPTH)

    def _embed(self, query: str) -> Any:
        encoder = self._preparation.encoder
        assert encoder is not None
        with self._lock:
            return encoder.embed([query])[0]

    def _listed(self, keys: Sequence[LatentKey]) -> dict[LatentKey, dict[str, Any]]:
        found = {}
        for name in dict.fromkeys(sae for sae, _ in keys):
            some = self._tables.some(name, [latent for sae, latent in keys if sae == name])
            found |= {(name, latent): row for latent, row in some.items()}
        return found


def fuse(rankings: Sequence[Mapping[LatentKey, float]]) -> list[tuple[LatentKey, float]]:
    """Return what several rankings, each in order, say together: reciprocal rank fusion, the best first."""
    total: dict[LatentKey, float] = {}
    for ranking in rankings:
        for place, key in enumerate(ranking, 1):
            total[key] = total.get(key, 0.0) + 1 / (RANK_OFFSET + place)
    return sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))


def _largest(scores: Mapping[LatentKey, float], n: int) -> dict[LatentKey, float]:
    return dict(sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:n])


def _place(ranking: Mapping[LatentKey, float], key: LatentKey) -> int | None:
    return list(ranking).index(key) + 1 if key in ranking else None
