"""The held-out windows on which every explanation of a latent is scored, from any explainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from .corpus import Corpus, Firings

HIGHLIGHT = 0.3
"""Tokens are highlighted whose activation is above this share of the largest one on training rows."""
TRIAL_SIZE = 5
"""Windows of an intruder trial, one of which is the intruder: chance finds it one time in five."""


@dataclass(frozen=True)
class Trial:
    """Windows with highlighted rows, of which the `intruder`-th does not activate the latent."""

    windows: Int64[np.ndarray, " windows"]
    highlights: tuple[Int64[np.ndarray, " rows"], ...]
    intruder: int


@dataclass(frozen=True)
class Sample:
    """Windows of one latent in held-out documents.

    `active` says in which the latent fires. `highlights` are rows of each window: where it fires strongly, or as many
    random rows where it does not fire. `trials` are for intruder detection.
    """

    windows: Int64[np.ndarray, " windows"]
    active: Bool[np.ndarray, " windows"]
    highlights: tuple[Int64[np.ndarray, " rows"], ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class SampleSettings:
    """How many windows a sample has and how they are drawn, as `ExplainConfig` says."""

    n_score: int
    n_quantiles: int
    n_trials: int
    neighbours: Mapping[int, Sequence[int]] | None
    seed: int


class LatentSampler:
    """Draws the sample of each latent. It depends on the seed and the latent, not on which others are drawn."""

    def __init__(self, corpus: Corpus, firings: Firings, settings: SampleSettings, near: Firings | None = None):
        self.corpus, self.firings, self.settings, self.near = corpus, firings, settings, near
        windows = np.arange(corpus.first_test_window, corpus.n_windows)
        self.there = windows[corpus.window_rows[windows] > 0]

    def draw(self, number: int) -> Sample:
        """Draw the windows of the `number`-th latent; a latent that fires in no held-out window gets no windows."""
        corpus, settings = self.corpus, self.settings
        latent = int(self.firings.latents[number])
        rng = np.random.default_rng([settings.seed, latent])
        row, value = self.firings.of(number)
        split = int(np.searchsorted(row, corpus.n_train))
        threshold = HIGHLIGHT * float(value[:split].max(initial=0))
        row, value = row[split:], value[split:]
        inside = corpus.window_of[row] >= 0
        row, value = row[inside], value[inside]
        window = corpus.window_of[row]
        active, peak = _largest(window, value)
        inactive = np.setdiff1d(self.there, active, assume_unique=True)
        if not len(active) or not len(inactive):
            return Sample(np.zeros(0, np.int64), np.zeros(0, bool), (), ())
        chosen = _by_quantile(active, peak, settings.n_score, settings.n_quantiles, rng)
        inactive = self._negatives(latent, inactive, rng)
        strong = value > threshold
        highlights = [_highlighted(row, value, strong, window == one) for one in chosen]
        usual = max(1, round(float(np.mean([len(rows) for rows in highlights]))))
        wrong = [self._random_rows(one, usual, rng) for one in inactive]
        trials = self._trials(chosen, highlights, inactive, wrong, rng)
        return Sample(
            np.concatenate([chosen, inactive]),
            np.arange(len(chosen) + len(inactive)) < len(chosen),
            (*highlights, *wrong),
            trials,
        )

    def _negatives(self, latent: int, inactive: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw windows without the latent: first those with a neighbour of it, if they are asked for."""
        n = self.settings.n_score
        hard = np.zeros(0, dtype=np.int64)
        if self.settings.neighbours is not None and self.near is not None:
            numbers = np.searchsorted(self.near.latents, self.settings.neighbours.get(latent, ()))
            rows = np.concatenate([np.zeros(0, np.int64), *(self.near.of(int(other))[0] for other in numbers)])
            windows = self.corpus.window_of[rows[rows >= self.corpus.n_train]]
            hard = np.intersect1d(windows, inactive)
            hard = rng.choice(hard, min(n, len(hard)), replace=False)
        others = np.setdiff1d(inactive, hard)
        return np.concatenate([hard, rng.choice(others, min(n - len(hard), len(others)), replace=False)])

    def _random_rows(self, window: int, n: int, rng: np.random.Generator) -> np.ndarray:
        rows = self.corpus.window_start[window] + np.arange(self.corpus.window)
        rows = rows[self.corpus.usable[rows]]
        return np.sort(rng.choice(rows, min(n, len(rows)), replace=False))

    def _trials(
        self,
        active: np.ndarray,
        highlights: list[np.ndarray],
        inactive: np.ndarray,
        wrong: list[np.ndarray],
        rng: np.random.Generator,
    ) -> tuple[Trial, ...]:
        """Draw trials whose intruders differ; none where the latent is active in too few windows."""
        if len(active) < TRIAL_SIZE - 1:
            return ()
        trials = []
        for other in rng.permutation(len(inactive))[: self.settings.n_trials]:
            own = rng.choice(len(active), TRIAL_SIZE - 1, replace=False)
            at = int(rng.integers(TRIAL_SIZE))
            windows = np.insert(active[own], at, inactive[other])
            rows = [highlights[i] for i in own]
            rows.insert(at, wrong[other])
            trials.append(Trial(windows, tuple(rows), at))
        return tuple(trials)


def windows_by_quantile(
    window: np.ndarray, value: np.ndarray, n: int, n_quantiles: int, rng: np.random.Generator
) -> Int64[np.ndarray, " chosen"]:
    """Draw at most `n` of the windows that firings are in, equally many from each quantile of the largest one."""
    return _by_quantile(*_largest(window, value), n, n_quantiles, rng)


def _largest(window: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each window that occurs, in order, and the largest of its values."""
    order = np.lexsort((value, window))
    last = np.diff(window[order], append=-1) != 0
    return window[order][last], value[order][last]


def _highlighted(row: np.ndarray, value: np.ndarray, strong: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Return the rows of a window where the latent fires strongly; the strongest one where it does nowhere."""
    found = row[here & strong]
    return found if len(found) else row[here][value[here].argmax()][None]


def _by_quantile(
    window: np.ndarray, peak: np.ndarray, n: int, n_quantiles: int, rng: np.random.Generator
) -> Int64[np.ndarray, " chosen"]:
    """Draw at most `n` windows, equally many from each quantile of the largest activation, as far as they last."""
    if len(window) <= n:
        return window
    parts = [rng.permutation(part) for part in np.array_split(window[np.argsort(peak, kind="stable")], n_quantiles)]
    turns = [part[turn] for turn in range(max(map(len, parts))) for part in reversed(parts) if turn < len(part)]
    return np.sort(np.array(turns[:n]))
