"""Rules and scores on a corpus in which it is known why latents fire, against plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import regex

from thresher.evaluate.explain.corpus import Corpus, Firings
from thresher.evaluate.explain.rules.search import (
    Part,
    RuleSearch,
    in_words,
    matching_rows,
    predicted,
    token_frequency_rules,
)
from thresher.evaluate.explain.rules.views import build_views, shape, token_in_words
from thresher.evaluate.explain.samples import LatentSampler, SampleSettings
from thresher.evaluate.explain.scores import ScoreSums, score_intruders, score_rules
from thresher.evaluate.features.token_text import TokenTexts

WORDS = [*(f" w{i}" for i in range(30)), " def", " class", "(", ")", "\n", " 42", " Жуки", " naïve"]
DEF, CLASS, OPEN = WORDS.index(" def"), WORDS.index(" class"), WORDS.index("(")
SIZE, WINDOW = 64, 16


def make_corpus(n_train=120, n_test=40, seed=0):
    rng = np.random.default_rng(seed)
    n = n_train + n_test
    tokens = rng.integers(0, len(WORDS), (n, SIZE)).astype(np.int32)
    usable = np.ones((n, SIZE), dtype=bool)
    usable[:, 0] = False
    group = np.repeat(np.concatenate([np.arange(n_train) // 4, np.arange(n_test) // 4])[:, None], SIZE, axis=1)

    def part(first, last):
        return SimpleNamespace(contexts=np.arange(first, last), n_groups=(last - first + 3) // 4)

    position = np.tile(np.arange(SIZE), n)
    train, test = part(0, n_train), part(n_train, n)
    flat = (tokens.reshape(-1), usable.reshape(-1), group.reshape(-1), position)
    return Corpus(train, test, *flat, SIZE, WINDOW)  # pyright: ignore[reportArgumentType]


def fire(corpus, *masks, seed=1):
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(mask & corpus.usable) for mask in masks]
    start = np.concatenate([[0], np.cumsum([len(part) for part in rows])])
    values = rng.uniform(1, 3, start[-1]).astype(np.float32)
    return Firings(np.arange(len(masks)), start, np.concatenate(rows), values)


@pytest.fixture(scope="module")
def known():
    corpus = make_corpus()
    token = corpus.tokens
    after = np.concatenate([[False], token[:-1] == OPEN]) & (np.arange(len(token)) % SIZE > 0)
    noise = np.random.default_rng(5).random(len(token)) < 0.1
    firings = fire(corpus, np.isin(token, [DEF, CLASS]), after, (token == DEF) & after, noise)
    views = build_views(corpus, TokenTexts(dict(enumerate(WORDS)), {}))
    search = RuleSearch(corpus, firings, views, max_parts=6, seed=0)
    return SimpleNamespace(corpus=corpus, firings=firings, views=views, search=search, rules=search.search())


def test_the_search_finds_why_a_latent_fires_and_says_it(known):
    said = [in_words(rule, known.views) for rule in known.rules]
    assert said[0] in ("Fires on ` def` or ` class`.", "Fires on ` class` or ` def`.")
    assert said[1] == "Fires on the token after `(`."
    assert said[2] == "Fires on ` def` after `(`."
    for number in range(3):
        rows = predicted(known.corpus, known.views, known.rules[number], 0, known.corpus.n_rows)[0]
        assert np.array_equal(rows, known.firings.of(number)[0])


def test_the_expected_activation_is_the_mean_on_training_rows(known):
    row, value = known.firings.of(1)
    rows, expected = predicted(known.corpus, known.views, known.rules[1], 0, known.corpus.n_rows)
    assert expected == pytest.approx(np.full(len(rows), value[row < known.corpus.n_train].mean()))


def plain_rows(corpus, view, value):
    """The usable rows on which a value of a view holds, row by row."""
    found = []
    for row in range(corpus.n_rows):
        first = row - row % SIZE
        sources = range(max(first, row - view.reach), row) if view.reach else [row]
        if corpus.usable[row] and any(view.value[source] == value for source in sources):
            found.append(row)
    return found


def test_rows_and_windows_of_parts_agree_with_plain_loops():
    corpus = make_corpus(n_train=6, n_test=2, seed=7)
    views = build_views(corpus, TokenTexts(dict(enumerate(WORDS)), {}))
    search = RuleSearch(corpus, fire(corpus, corpus.tokens == DEF), views, 4, 0)
    rng = np.random.default_rng(1)
    for number, view in enumerate(views):
        for value in rng.choice(np.unique(view.value[view.value >= 0]), 3).tolist():
            expected = plain_rows(corpus, view, value)
            assert matching_rows(corpus, view, value, 0, corpus.n_rows).tolist() == expected
            windows = sorted({row // WINDOW for row in expected if row < corpus.n_train})
            assert search._training_windows(Part(((number, value),), 1.0, 1.0)).tolist() == windows


def test_the_join_agrees_with_plain_sets(known):
    """Add the part that tells most windows apart, window by window, as long as one adds enough."""
    search, corpus = known.search, known.corpus
    n_windows = corpus.first_test_window
    for number in range(3):
        [found] = search._candidates(0, range(number, number + 1))
        active = {row // WINDOW for row in known.firings.of(number)[0].tolist() if row < corpus.n_train}
        weight = {w: 1 / len(active) if w in active else -1 / (n_windows - len(active)) for w in range(n_windows)}
        holds = {
            part: {row // WINDOW for row in plain_rows(corpus, known.views[0], part.conditions[0][1])} & set(weight)
            for part in found
        }
        chosen, covered = [], set()
        while len(chosen) < 6:
            gains = [sum(weight[w] for w in holds[part] - covered) for part in found]
            if max(gains, default=0) < 0.005:
                break
            chosen.append(found[int(np.argmax(gains))])
            covered |= holds[chosen[-1]]
        assert list(search._join(number, found)) == chosen
        assert chosen or number == 1


def test_held_out_rows_do_not_change_what_is_said(known):
    corpus = make_corpus()
    corpus.tokens[corpus.n_train :] = np.random.default_rng(9).integers(0, len(WORDS), corpus.n_rows - corpus.n_train)
    kept = [known.firings.of(i)[0][known.firings.of(i)[0] < corpus.n_train] for i in range(4)]
    values = np.concatenate([known.firings.of(i)[1][: len(rows)] for i, rows in enumerate(kept)])
    start = np.concatenate([[0], np.cumsum([len(rows) for rows in kept])])
    firings = Firings(np.arange(4), start, np.concatenate(kept), values)
    views = build_views(corpus, TokenTexts(dict(enumerate(WORDS)), {}))
    rules = RuleSearch(corpus, firings, views, 6, 0).search()
    assert [in_words(rule, views) for rule in rules] == [in_words(rule, known.views) for rule in known.rules]


def sampled(known, **changes):
    settings = {"n_score": 12, "n_quantiles": 4, "n_trials": 6, "neighbours": None, "seed": 3} | changes
    sampler = LatentSampler(known.corpus, known.firings, SampleSettings(**settings), known.firings)
    return [sampler.draw(number) for number in range(len(known.firings.latents))]


def test_samples_are_held_out_windows_that_are_what_they_are_said_to_be(known):
    corpus = known.corpus
    for number, sample in enumerate(sampled(known)):
        fired = np.unique(corpus.window_of[known.firings.of(number)[0]])
        assert sample.windows.min() >= corpus.first_test_window
        assert len(np.unique(sample.windows)) == len(sample.windows)
        assert np.array_equal(np.isin(sample.windows, fired), sample.active)
        for window, rows in zip(sample.windows, sample.highlights, strict=True):
            assert (corpus.window_of[rows] == window).all()
            assert corpus.usable[rows].all()
        for trial in sample.trials:
            assert np.array_equal(~np.isin(trial.windows, fired), np.arange(5) == trial.intruder)


def test_hard_negatives_are_windows_with_a_neighbour(known):
    sample = sampled(known, neighbours={0: [1], 1: [0], 2: [0], 3: [1]})[1]
    with_neighbour = np.unique(known.corpus.window_of[known.firings.of(0)[0]])
    assert np.isin(sample.windows[~sample.active], with_neighbour).all()
    assert len(sample.windows[~sample.active]) == 12


def plain_scores(known, number, rule, sample):
    """The scores of one rule, by sets and loops."""
    corpus = known.corpus
    row, value = known.firings.of(number)
    act = dict(zip(row.tolist(), value.tolist(), strict=True))
    expected = dict(zip(*(a.tolist() for a in predicted(corpus, known.views, rule, 0, corpus.n_rows)), strict=True))
    test = [r for r in range(corpus.n_train, corpus.n_rows) if corpus.usable[r]]

    def balanced(truth, said):
        pairs = list(zip(truth, said, strict=True))
        yes, no = [s for t, s in pairs if t], [s for t, s in pairs if not t]
        return (np.mean(yes) + 1 - np.mean(no)) / 2

    inside = {w: [r for r in test if corpus.window_of[r] == w] for w in sample.windows.tolist()}
    hits = [any(r in expected for r in rows) for rows in inside.values()]
    marked = [np.mean([r in expected for r in rows.tolist()]) >= 0.5 for rows in sample.highlights]
    rows = [r for part in inside.values() for r in part]
    x, y = [act.get(r, 0.0) for r in rows], [expected.get(r, 0.0) for r in rows]
    tp = sum(r in act and r in expected for r in test)
    return {
        "detection": balanced(sample.active, hits),
        "fuzzing": balanced(sample.active, marked),
        "simulation": np.corrcoef(x, y)[0, 1],
        "precision": tp / max(sum(r in expected for r in test), 1),
        "recall": tp / sum(r in act for r in test),
        "balanced_accuracy": balanced([r in act for r in test], [r in expected for r in test]),
    }


def test_scores_agree_with_plain_loops(known):
    samples = sampled(known)
    rules = [known.rules[1], known.rules[1], known.rules[0], known.rules[2]]
    sums = ScoreSums(known.corpus.test.n_groups, 4)
    score_rules(known.corpus, known.firings, known.views, rules, samples, sums)
    scores = sums.table(200, 0)
    for number in range(4):
        expected = plain_scores(known, number, rules[number], samples[number])
        found = {name: scores[name][number] for name in expected}
        assert found == pytest.approx(expected, abs=1e-9), number
        for name in expected:
            assert scores[f"{name}_low"][number] <= scores[name][number] <= scores[f"{name}_high"][number]


def test_baselines(known):
    rules = token_frequency_rules(known.search, [2, 1, 1, 3])
    assert in_words(rules[0], known.views) in ("Fires on ` def` or ` class`.", "Fires on ` class` or ` def`.")
    assert len(rules[3]) == 3
    samples = sampled(known)
    sums = ScoreSums(known.corpus.test.n_groups, 4)
    wrong = [known.rules[1], known.rules[0], known.rules[0], known.rules[0]]
    score_rules(known.corpus, known.firings, known.views, wrong, samples, sums)
    assert sums.table(0, 0)["balanced_accuracy"][:2] == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_judge_finds_intruders_of_latents_that_fire_on_a_token_only(known):
    sums = ScoreSums(known.corpus.test.n_groups, 4)
    score_intruders(known.corpus, known.views, sampled(known, n_trials=12), sums)
    found = sums.table(0, 0)["intruder"]
    assert found[1] > 0.9
    assert found[3] < 0.6  # fires at random: chance is 0.2


def test_a_rule_without_parts_predicts_nothing(known):
    sums = ScoreSums(known.corpus.test.n_groups, 4)
    score_rules(known.corpus, known.firings, known.views, [()] * 4, sampled(known), sums)
    scores = sums.table(0, 0)
    assert scores["detection"] == pytest.approx(np.full(4, 0.5))
    assert scores["simulation"] == pytest.approx(np.zeros(4))
    assert in_words((), known.views).startswith("No short rule")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["नमस्कार", "नमस्ते", "नदी", "घर", "किताब", "पानी"], "words that begin with `नमस्`"),
        (["👩\u200d👩\u200d👧", "👩\u200d👦", "👩", "🧑🏽\u200d🚀", "!", "?"], "`👩\u200d👩\u200d👧`"),
        (["كتاب", "بيت", "ماء", "شمس", "قمر", "نهر"], "`كتاب`"),
        (["山", "川", "雨", "雪", "花", "鳥"], "`山`"),
    ],
)
def test_rules_in_any_script(words, said):
    """The latent fires on the first word; it is said in whole graphemes."""
    corpus = make_corpus()
    corpus.tokens[:] = np.random.default_rng(2).integers(0, len(words), corpus.n_rows)
    views = build_views(corpus, TokenTexts(dict(enumerate(words)), {}))
    firings = fire(corpus, np.isin(corpus.tokens, [0, 1]) if "begin" in said else corpus.tokens == 0)
    [rule] = RuleSearch(corpus, firings, views, 6, 0).search()
    text = in_words(rule, views)
    rows = predicted(corpus, views, rule, 0, corpus.n_rows)[0]
    assert np.array_equal(rows, firings.of(0)[0])
    if "begin" not in said:
        assert text == f"Fires on {said}."
    prefixes = next(view for view in views if view.name == "prefix")
    for value in range(prefixes.n_values):
        shown = prefixes.describe(value).split("`")[1]
        assert len(regex.findall(r"\X", shown)) == 3
        assert any(word.startswith(shown) for word in words)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" Hello", "capitalised words (Latin)"),
        ("ABC", "words in capitals (Latin)"),
        (" мир", "lower-case words (Cyrillic)"),
        ("日本", "words (Han)"),
        (" 42", "numbers"),
        ("()", "brackets"),
        ("\n  ", "newlines"),
        (" ...", "punctuation"),
    ],
)
def test_kinds_of_tokens(text, kind):
    assert shape(text) == kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" def", "` def`"),
        ("\n", "a newline"),
        ("\n    ", "a newline and 4 spaces"),
        ("  ", "2 spaces"),
        ("\x00", "`\\x00`"),
    ],
)
def test_tokens_in_words(text, said):
    assert token_in_words(text) == said
