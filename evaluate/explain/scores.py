"""Scores of explanations, as sums over documents: metrics and their intervals follow from the sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from ..metrics.bootstrap import CONFIDENCE, resampling_weights
from .corpus import Corpus, Firings
from .rules.search import Rule, predicted
from .rules.views import View
from .samples import Sample

SCORES = ("detection", "fuzzing", "simulation", "intruder")
"""The scores of every explanation; `intruder` needs no explanation, only a judge."""
EXACT = ("precision", "recall", "balanced_accuracy")
"""The scores of rules over all held-out rows."""
CAUSAL = ("causal", "causal_clean")
"""How much more often a rule fires on generated text with the latent steered: than with another one, than without."""
CHANCE = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0, "intruder": 0.2, "balanced_accuracy": 0.5}

ScoreColumns = dict[str, Float64[np.ndarray, "groups latents"]]


class ScoreSums:
    """Sums by document group and latent of what the scores are made of."""

    COUNTS = (
        *(f"{score}_{part}" for score in ("detection", "fuzzing", "token") for part in ("tp", "fn", "fp", "tn")),
        *("right", "trials", "n", "x", "y", "xx", "yy", "xy"),
    )

    def __init__(self, n_groups: int, n_latents: int):
        self.sums: ScoreColumns = {name: np.zeros((n_groups, n_latents)) for name in self.COUNTS}

    def add_answers(
        self,
        score: str,
        latent: int,
        group: Int64[np.ndarray, " items"],
        truth: Bool[np.ndarray, " items"],
        said: Bool[np.ndarray, " items"],
        known: Bool[np.ndarray, " items"] | None = None,
    ) -> None:
        """Count answers of yes and no; those that are not `known` (no usable answer came) are left out."""
        known = np.ones(len(truth), dtype=bool) if known is None else known
        for part, which in (
            ("tp", truth & said),
            ("fn", truth & ~said),
            ("fp", ~truth & said),
            ("tn", ~truth & ~said),
        ):
            np.add.at(self.sums[f"{score}_{part}"][:, latent], group[which & known], 1)

    def add_trials(self, latent: int, group: np.ndarray, right: np.ndarray) -> None:
        """Count intruder trials, and those in which the judge found the intruder."""
        np.add.at(self.sums["trials"][:, latent], group, 1)
        np.add.at(self.sums["right"][:, latent], group, right)

    def add_activations(
        self, latent: int, group: np.ndarray, actual: Float[np.ndarray, " rows"], expected: Float[np.ndarray, " rows"]
    ) -> None:
        """Add what the correlation of actual and predicted activations is made of."""
        x, y = actual.astype(np.float64), expected.astype(np.float64)
        for name, value in (("n", np.ones(len(x))), ("x", x), ("y", y), ("xx", x * x), ("yy", y * y), ("xy", x * y)):
            np.add.at(self.sums[name][:, latent], group, value)

    def table(self, n_samples: int, seed: int) -> dict[str, Float64[np.ndarray, " latents"]]:
        """Return every score and its interval (`_low`, `_high`) of every latent; NaN where there is none.

        The interval is the 95% percentile interval over resamples of the held-out documents with replacement, the same
        resamples for every latent and score. It is NaN where fewer than two documents count.
        """
        totals = {name: value.sum(axis=0) for name, value in self.sums.items()}
        found = dict(_metrics(totals))
        n_groups = len(self.sums["n"])
        weights = np.zeros((0, n_groups))
        if n_samples and n_groups > 1:
            weights = resampling_weights(n_groups, n_samples, seed)
        tail = (1 - CONFIDENCE) / 2
        bounds = {name: np.full((2, len(totals["n"])), np.nan) for name in found}
        for start in range(0, len(totals["n"]), 256) if len(weights) else ():
            part = slice(start, start + 256)
            resampled_metrics = _metrics({name: weights @ value[:, part] for name, value in self.sums.items()})
            for name, values in resampled_metrics.items():
                bounds[name][:, part] = _nan_quantile(values, [tail, 1 - tail])
        for name, several in self._documents().items():
            bounds[name][:, ~several] = np.nan
        return found | {
            f"{name}_{end}": bounds[name][i] for name in list(found) for i, end in enumerate(("low", "high"))
        }

    def _documents(self) -> dict[str, Bool[np.ndarray, " latents"]]:
        """Return, by score, which latents have items of it in at least two groups."""
        sums = self.sums
        of = {
            "detection": sum(sums[f"detection_{part}"] for part in ("tp", "fn", "fp", "tn")),
            "fuzzing": sum(sums[f"fuzzing_{part}"] for part in ("tp", "fn", "fp", "tn")),
            "simulation": sums["n"],
            "intruder": sums["trials"],
            **{name: sums["token_tp"] + sums["token_fn"] for name in EXACT},
        }
        return {name: (np.asarray(value) > 0).sum(axis=0) >= 2 for name, value in of.items()}


def _metrics(s: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the scores from sums; NaN where the sums do not say."""
    with np.errstate(divide="ignore", invalid="ignore"):
        n = s["n"]
        covariance = s["xy"] - s["x"] * s["y"] / n
        spread = (s["xx"] - s["x"] ** 2 / n).clip(0) * (s["yy"] - s["y"] ** 2 / n).clip(0)
        # An explanation that predicts the same everywhere explains nothing: correlation 0, not undefined.
        flat = (s["yy"] - s["y"] ** 2 / n) <= 1e-12 * s["yy"]
        correlation = np.where(flat & (n > 0), 0.0, covariance / np.sqrt(spread)).clip(-1, 1)
        tp, fn, fp = s["token_tp"], s["token_fn"], s["token_fp"]
        return {
            "detection": _balanced(s, "detection"),
            "fuzzing": _balanced(s, "fuzzing"),
            "simulation": correlation,
            "intruder": s["right"] / s["trials"],
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "balanced_accuracy": _balanced(s, "token"),
        }


def _balanced(s: dict[str, np.ndarray], score: str) -> np.ndarray:
    """Return the mean of the true positive and the true negative rate."""
    tp, fn, fp, tn = (s[f"{score}_{part}"] for part in ("tp", "fn", "fp", "tn"))
    return (tp / (tp + fn) + tn / (tn + fp)) / 2


def _nan_quantile(values: np.ndarray, at: Sequence[float]) -> np.ndarray:
    """Return quantiles of each column over its finite values; NaN for a column without any."""
    found = np.full((len(at), values.shape[1]), np.nan)
    some = np.isfinite(values).any(axis=0)
    if some.any():
        found[:, some] = np.nanquantile(np.where(np.isfinite(values), values, np.nan)[:, some], at, axis=0)
    return found


def score_rules(
    corpus: Corpus,
    firings: Firings,
    views: Sequence[View],
    rules: Sequence[Rule],
    samples: Sequence[Sample],
    sums: ScoreSums,
) -> None:
    """Add the scores of each latent's rule: what it predicts of the sample, and of every held-out row."""
    usable = np.zeros(corpus.n_rows, dtype=bool)
    usable[corpus.n_train :] = corpus.usable[corpus.n_train :]
    group = corpus.group
    n_groups = len(sums.sums["n"])
    rows_of_group = np.bincount(group[usable], minlength=n_groups)
    held, fired = np.zeros(corpus.n_rows, dtype=bool), np.zeros(corpus.n_rows, dtype=bool)
    windows = np.zeros(corpus.n_windows, dtype=bool)
    for number, (rule, sample) in enumerate(zip(rules, samples, strict=True)):
        said, expected = predicted(corpus, views, rule, corpus.n_train, corpus.n_rows)
        row, value = firings.of(number)
        test = row >= corpus.n_train
        row, value = row[test], value[test]
        held[:], fired[:] = False, False
        held[said], fired[row] = True, True
        right = fired[said]
        tp = np.bincount(group[said[right]], minlength=n_groups)
        fp = np.bincount(group[said[~right]], minlength=n_groups)
        fn = np.bincount(group[row], minlength=n_groups) - tp
        parts = {"tp": tp, "fp": fp, "fn": fn, "tn": rows_of_group - tp - fp - fn}
        for part, counts in parts.items():
            sums.sums[f"token_{part}"][:, number] += counts
        if not len(sample.windows):
            continue
        where = corpus.window_group[sample.windows]
        in_window = corpus.window_of[said]
        windows[:] = False
        windows[in_window[in_window >= 0]] = True
        hit = windows[sample.windows]
        sums.add_answers("detection", number, where, sample.active, hit)
        marked = np.array([2 * np.count_nonzero(held[rows]) >= len(rows) for rows in sample.highlights])
        sums.add_answers("fuzzing", number, where, sample.active, marked)
        rows = (corpus.window_start[sample.windows][:, None] + np.arange(corpus.window)).reshape(-1)
        rows = rows[usable[rows]]
        sums.add_activations(number, group[rows], _at(rows, row, value), _at(rows, said, expected))


def _at(wanted: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values at wanted rows, from values at sorted rows; zero elsewhere."""
    if not len(rows):
        return np.zeros(len(wanted))
    place = np.searchsorted(rows, wanted).clip(max=len(rows) - 1)
    return np.where(rows[place] == wanted, values[place], 0.0)


def score_intruders(corpus: Corpus, views: Sequence[View], samples: Sequence[Sample], sums: ScoreSums) -> None:
    """Add intruder detection by a judge that only compares tokens: the window least like the others is the intruder.

    Two windows are alike as far as the values of the views agree at their highlighted rows. A value counts for more,
    the rarer it is (the logarithm of its inverse frequency); the likeness is the sum over shared values, over the
    geometric mean of the two windows' own sums.
    """
    judged = [view for view in views if not view.reach]
    first = np.cumsum([0, *(view.n_values for view in judged)])
    values = np.stack(
        [np.where(view.value >= 0, view.value + start, -1) for view, start in zip(judged, first, strict=False)]
    )
    rarity = np.log(corpus.n_rows / np.bincount(values[values >= 0], minlength=int(first[-1])).clip(1))
    for number, sample in enumerate(samples):
        if not sample.trials:
            continue
        right = np.array([_least_alike(trial.highlights, values, rarity) == trial.intruder for trial in sample.trials])
        group = corpus.window_group[[trial.windows[trial.intruder] for trial in sample.trials]]
        sums.add_trials(number, group, right)


def _least_alike(
    highlights: Sequence[np.ndarray], values: Int64[np.ndarray, "views rows"], rarity: Float64[np.ndarray, " values"]
) -> int:
    found = [values[:, rows].reshape(-1) for rows in highlights]
    known, place = np.unique(np.concatenate(found), return_inverse=True)
    has = np.zeros((len(found), len(known)))
    has[np.repeat(np.arange(len(found)), [len(part) for part in found]), place] = 1
    weight = np.where(known >= 0, rarity[known], 0.0)
    shared = (has * weight) @ has.T
    own = np.sqrt(np.diag(shared).clip(1e-12))
    alike = shared / own[:, None] / own
    return int((alike.sum(axis=1) - np.diag(alike)).argmin())
