"""Explain latents by short rules over tokens, without a language model.

A rule is a list of parts, each a value of a view: "fires on `def`; on the token after `import`". It predicts that the
latent fires wherever any part holds. The search takes, per latent, the parts that predict its firings best on training
rows, and joins them greedily as long as that tells windows with the latent from windows without it better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from ....shared.core.terminal.progress import progress as show_progress
from ..corpus import Corpus, Firings
from .views import View

_LATENTS_AT_A_TIME = 128
FALSE_ALARM_WEIGHTS = (2.0, 16.0)
"""Weights of false firings against missed ones by which candidates are ranked.

A window of many tokens is a false alarm already if one of its tokens is, so no single weight suits every latent.
"""
CANDIDATES = 16
"""Candidates of a latent per view and weight."""
LEAST_LIFT = 2.0
"""A part must make the latent at least so many times as likely."""
LEAST_HITS = 3
"""A part must hold on at least so many rows on which the latent fires."""
LEAST_GAIN = 0.005
"""A part must add at least so much to true minus false positive rate."""
REFINED, REFINEMENTS = 6, 3
"""Parts of a latent that are refined by a second condition, and refinements of each per view and weight."""
PRECISE, PURER = 0.7, 1.5
"""A part is refined if it is right less often than the first, and by conditions that make it so many times as right."""
CONDITION_COST = 0.002
"""What a part must gain more for a second condition."""
LEAST_PRECISIONS = (0.0, 0.3, 0.6, 0.9)
"""A latent's parts are joined once from all candidates and once from those that are right at least so often each.

Once a broad part is chosen, better narrow ones gain nothing any more; the best of the rules is kept.
"""
MOST_WINDOWS = 3000
"""Windows of each kind, with the latent and without, that a search uses at most."""


Condition = tuple[int, int]
"""A view, by its number, and one of its values."""


@dataclass(frozen=True)
class Part:
    """Conditions that must all hold, and what is then expected on training rows.

    `activation` is the mean activation where they hold, `precision` the share of those rows on which the latent fires.
    """

    conditions: tuple[Condition, ...]
    activation: float
    precision: float


Rule = tuple[Part, ...]


class RuleSearch:
    """Searches rules for latents, from the training rows of a corpus alone."""

    def __init__(self, corpus: Corpus, firings: Firings, views: Sequence[View], max_parts: int, seed: int):
        self.corpus, self.firings, self.views = corpus, firings, views
        self.max_parts, self.seed = max_parts, seed
        self._windows: dict[tuple[Condition, ...], np.ndarray] = {}
        self.usable = corpus.usable[: corpus.n_train]
        self.n_usable = int(self.usable.sum())
        rows = np.flatnonzero(self.usable)
        self.totals = [
            np.bincount(values[values >= 0], minlength=view.n_values)
            for view in views
            for values in [np.concatenate([part for _, part in self._values(view, rows)])]
        ]

    def _values(self, view: View, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (places in `rows`, values): each value that holds on a row once."""
        if not view.reach:
            yield np.arange(len(rows)), view.value[rows]
            return
        if not hasattr(self, "_next"):
            self._next = next_with_same_value(view.value)
        for distance in range(1, view.reach + 1):
            place = np.flatnonzero(rows % self.corpus.context_size >= distance)
            source = rows[place] - distance
            nearest = self._next[source] >= rows[place]  # else the same token, nearer, has counted
            yield place[nearest], view.value[source[nearest]]

    def search(self) -> list[Rule]:
        """Return a rule per latent of the firings; an empty rule where no part predicts it."""
        rules: list[Rule] = []
        n = len(self.firings.latents)
        with show_progress(total=n, unit="latent", desc="search rules") as progress:
            for first in range(0, n, _LATENTS_AT_A_TIME):
                numbers = range(first, min(first + _LATENTS_AT_A_TIME, n))
                tables = [self._candidates(view, numbers) for view in range(len(self.views))]
                for place, number in enumerate(numbers):
                    found = [part for table in tables for part in table[place]]
                    rules.append(self._join(number, found + self._refine(number, found)))
                progress.update(len(numbers))
        return rules

    def _training_entries(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        row, value = self.firings.of(number)
        stop = np.searchsorted(row, self.corpus.n_train)
        return row[:stop], value[:stop]

    def _candidates(self, number_of_view: int, numbers: range) -> list[list[Part]]:
        """Return the most promising parts of one view for each of some latents."""
        view, total = self.views[number_of_view], self.totals[number_of_view]
        entries = [self._training_entries(number) for number in numbers]
        row = np.concatenate([row for row, _ in entries])
        activation = np.concatenate([value for _, value in entries]).astype(np.float64)
        count = np.array([len(row) for row, _ in entries])
        latent = np.repeat(np.arange(len(numbers)), count)
        shape = (len(numbers), view.n_values)
        keys, sources = [], []
        for place, value in self._values(view, row):
            known = value >= 0
            keys.append(latent[place[known]] * view.n_values + value[known])
            sources.append(place[known])
        key, source = np.concatenate(keys), np.concatenate(sources)
        hits = np.bincount(key, minlength=shape[0] * shape[1]).reshape(shape)
        latents, values = np.nonzero(hits >= LEAST_HITS)
        hit, n_fire = hits[latents, values], count[latents]
        precision = hit / total[values]
        base = n_fire / self.n_usable
        good = precision >= np.minimum(LEAST_LIFT * base, (1 + base) / 2)
        latents, values, hit = latents[good], values[good], hit[good]
        n_fire, precision = n_fire[good], precision[good]
        false = (total[values] - hit) / np.maximum(self.n_usable - n_fire, 1)
        chosen = np.zeros(len(latents), dtype=bool)
        for weight in FALSE_ALARM_WEIGHTS:
            order = np.lexsort((-(hit / n_fire - weight * false), latents))
            by_latent = latents[order]
            first = np.searchsorted(by_latent, by_latent)
            chosen[order[np.arange(len(order)) - first < CANDIDATES]] = True
        sums = np.bincount(key, weights=activation[source], minlength=shape[0] * shape[1]).reshape(shape)
        found: list[list[Part]] = [[] for _ in numbers]
        for i in np.flatnonzero(chosen):
            a, v = int(latents[i]), int(values[i])
            found[a].append(Part(((number_of_view, v),), float(sums[a, v] / total[v]), float(precision[i])))
        return found

    def _refine(self, number: int, candidates: list[Part]) -> list[Part]:
        """Return parts that add a second condition to those that hold on most firings but are often wrong."""
        row, value = self._training_entries(number)
        n_other = max(self.n_usable - len(row), 1)
        fires = np.zeros(self.corpus.n_train, dtype=np.float32)
        fires[row] = value
        hits = np.array([self._coverage(part, len(row)) for part in candidates])
        found: list[Part] = []
        for i in np.argsort(-hits, kind="stable")[:REFINED]:
            part = candidates[i]
            if part.precision >= PRECISE:
                continue
            there = rows_of_part(self.corpus, self.views, part.conditions, 0, self.corpus.n_train)
            fired = fires[there] > 0
            for other, view in enumerate(self.views):
                if view.reach or other == part.conditions[0][0]:
                    continue
                of_value = view.value[there]
                known = of_value >= 0
                hit = np.bincount(of_value[known & fired], minlength=view.n_values)
                good = np.flatnonzero(hit >= LEAST_HITS)
                if not len(good):
                    continue
                total = np.bincount(of_value[known], minlength=view.n_values)
                n_known = np.count_nonzero(known)
                good = good[(hit[good] < n_known) & (hit[good] > PURER * part.precision * total[good])]
                for weight in FALSE_ALARM_WEIGHTS:
                    score = hit[good] / len(row) - weight * (total[good] - hit[good]) / n_other
                    for v in good[np.argsort(-score, kind="stable")[:REFINEMENTS]]:
                        expected = float(fires[there[of_value == v]].mean())
                        conditions = (*part.conditions, (other, int(v)))
                        found.append(Part(conditions, expected, float(hit[v] / total[v])))
        return list({part.conditions: part for part in found}.values())

    def _coverage(self, part: Part, n_fire: int) -> float:
        """Return the share of a latent's firings on which a part holds, less false alarms, as candidates are ranked."""
        (view, value), *_ = part.conditions
        total = self.totals[view][value]
        hit = part.precision * total
        return hit / n_fire - FALSE_ALARM_WEIGHTS[0] * (total - hit) / max(self.n_usable - n_fire, 1)

    def _join(self, number: int, candidates: list[Part]) -> Rule:
        """Join parts greedily by how well they tell training windows with the latent from those without."""
        corpus = self.corpus
        row, _ = self._training_entries(number)
        window = corpus.window_of[row]
        active = _each_once(window[window >= 0])
        if not candidates or not len(active):
            return ()
        others = corpus.window_rows[: corpus.first_test_window] > 0
        others[active] = False
        inactive = np.flatnonzero(others)
        rng = np.random.default_rng([self.seed, int(self.firings.latents[number])])
        active, inactive = (
            rng.choice(part, min(MOST_WINDOWS, len(part)), replace=False) for part in (active, inactive)
        )
        weight = np.concatenate(
            [np.full(len(active), 1 / len(active)), np.full(len(inactive), -1 / max(len(inactive), 1))]
        ).astype(np.float32)
        column = np.full(corpus.n_windows, -1)
        column[np.concatenate([active, inactive])] = np.arange(len(weight))
        holds = np.zeros((len(candidates), len(weight)), dtype=np.float32)
        for line, part in enumerate(candidates):
            columns = column[self._training_windows(part)]
            holds[line, columns[columns >= 0]] = 1
        precision = np.array([part.precision for part in candidates])
        # Of parts that gain the same, take the simplest, whatever order a product sums in.
        cost = np.array([CONDITION_COST * (len(part.conditions) - 1) for part in candidates])
        cost += CONDITION_COST / 100 * np.arange(len(candidates)) / len(candidates)
        best, found = 0.0, []
        for least in LEAST_PRECISIONS:
            allowed = np.flatnonzero(precision >= least)
            chosen, score = _greedy(holds[allowed], weight, cost[allowed], self.max_parts)
            if score > best + LEAST_GAIN:
                best, found = score, [candidates[allowed[i]] for i in chosen]
        return tuple(found)

    def _training_windows(self, part: Part) -> Int32[np.ndarray, " windows"]:
        """Return the windows of training rows in which a part holds; repeated where it holds several times."""
        known = self._windows.get(part.conditions)
        if known is None:
            rows = rows_of_part(self.corpus, self.views, part.conditions, 0, self.corpus.n_train)
            window = self.corpus.window_of[rows]
            known = _each_once(window[window >= 0]).astype(np.int32)
            if len(part.conditions) == 1:  # of use to other latents as well
                self._windows[part.conditions] = known
        return known


def _greedy(
    holds: Float32[np.ndarray, "parts windows"],
    weight: Float32[np.ndarray, " windows"],
    cost: Float64[np.ndarray, " parts"],
    most: int,
) -> tuple[list[int], float]:
    """Add parts one by one, always that of the largest gain less its cost; return them and the sum of these gains."""
    chosen: list[int] = []
    score, left = 0.0, weight.copy()
    while len(holds) and len(chosen) < most:
        gain = holds @ left - cost
        best = int(gain.argmax())
        if gain[best] < LEAST_GAIN:
            break
        chosen.append(best)
        score += float(gain[best])
        left[holds[best] > 0] = 0
    return chosen, score


def next_with_same_value(value: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Return the next row that has the same value, or the number of rows where there is none."""
    order = np.argsort(value, kind="stable")
    following = np.append(order[1:], len(value))
    same = np.append(value[order[1:]] == value[order[:-1]], False)
    found = np.full(len(value), len(value), dtype=np.int64)
    found[order] = np.where(same, following, len(value))
    return found


def _each_once(ordered: np.ndarray) -> np.ndarray:
    """Return the values of an array in order without repetitions; `np.unique` would sort or hash them."""
    return ordered[np.diff(ordered, prepend=-1) != 0]


def matching_rows(corpus: Corpus, view: View, value: int, start: int, stop: int) -> Int64[np.ndarray, " matches"]:
    """Return the usable rows in [start, stop) on which a value of a view holds, in order."""
    rows = view.rows_with(value)
    rows = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
    if view.reach:
        size = corpus.context_size
        # Each row reaches to the next that has the value, which reaches on from there: no row comes twice.
        ends = np.minimum(rows + view.reach, rows // size * size + size - 1)
        ends[:-1] = np.minimum(ends[:-1], rows[1:])
        count = ends - rows
        begin = np.cumsum(count) - count
        rows = np.repeat(rows + 1 - begin, count) + np.arange(count.sum())
    return rows[corpus.usable[rows]]


def rows_of_part(
    corpus: Corpus, views: Sequence[View], conditions: Sequence[Condition], start: int, stop: int
) -> Int64[np.ndarray, " matches"]:
    """Return the usable rows in [start, stop) on which all conditions hold, in order."""
    found = None
    for view, value in conditions:
        if found is not None and not views[view].reach:  # cheaper than to find all its rows
            found = found[views[view].value[found] == value]
            continue
        rows = matching_rows(corpus, views[view], value, start, stop)
        found = rows if found is None else np.intersect1d(found, rows, assume_unique=True)
    assert found is not None
    return found


def predicted(
    corpus: Corpus, views: Sequence[View], rule: Rule, start: int, stop: int
) -> tuple[Int64[np.ndarray, " matches"], Float64[np.ndarray, " matches"]]:
    """Return the rows in [start, stop) on which a rule says that the latent fires, and the activation it expects.

    That is the largest mean activation of the parts that hold there.
    """
    rows = [rows_of_part(corpus, views, part.conditions, start, stop) for part in rule]
    if not rows:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    expected = np.concatenate([np.full(len(found), part.activation) for found, part in zip(rows, rule, strict=True)])
    joined = np.concatenate(rows)
    order = np.lexsort((-expected, joined))
    first = np.diff(joined[order], prepend=-1) != 0
    return joined[order][first], expected[order][first]


def in_words(rule: Rule, views: Sequence[View]) -> str:
    """Say a rule in words; parts of one view are said together, in the order in which the search chose the views."""
    if not rule:
        return "No short rule over tokens predicts where it fires."
    by_view: dict[tuple[int, ...], list[str]] = {}
    for part in rule:
        kind = tuple(view for view, _ in part.conditions)
        group = kind if len(kind) == 1 else (*kind, *(value for _, value in part.conditions))
        by_view.setdefault(group, []).append(_say(part, views))
    clauses = [
        names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" or {names[-1]}" for names in by_view.values()
    ]
    return f"Fires on {'; on '.join(clauses)}."


def _say(part: Part, views: Sequence[View]) -> str:
    """Say a part: its first condition names the tokens, the others qualify them."""
    (view, value), *others = part.conditions
    text = views[view].describe(value)
    return text + "".join(f" if also on {views[view].describe(value)}" for view, value in others)


def token_frequency_rules(search: RuleSearch, sizes: Sequence[int]) -> list[Rule]:
    """Return, per latent, the rule of the tokens on which it fires most often: as many as `sizes` says."""
    rules = []
    token = next(i for i, view in enumerate(search.views) if view.name == "token")
    for number, size in enumerate(sizes):
        row, value = search._training_entries(number)
        known, place, count = np.unique(search.views[token].value[row], return_inverse=True, return_counts=True)
        best = np.lexsort((known, -count))[: max(size, 1)]
        sums = np.bincount(place, weights=value, minlength=len(known))
        totals = search.totals[token]
        rules.append(
            tuple(
                Part(((token, int(known[i])),), float(sums[i] / totals[known[i]]), float(count[i] / totals[known[i]]))
                for i in best
            )
        )
    return rules
