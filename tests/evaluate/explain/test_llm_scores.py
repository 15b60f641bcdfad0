"""Scores by a language model, computed anew in NumPy from nothing but the requests and the answers of a server."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import ExitStack

import numpy as np
import pytest

from thresher.evaluate.explain.judge import Counts, Judge
from thresher.evaluate.explain.llm.cache import AnswerCache
from thresher.evaluate.explain.llm.client import LlmClient
from thresher.evaluate.explain.llm.config import LlmConfig
from thresher.evaluate.explain.samples import LatentSampler, SampleSettings
from thresher.evaluate.explain.scores import SCORES, ScoreSums
from thresher.evaluate.explain.window_texts import WindowTexts
from thresher.evaluate.features.token_text import TokenTexts

from .scripted_server import ScriptedServer, answer
from .test_rules import CLASS, DEF, OPEN, WINDOW, WORDS, fire, make_corpus

N_LATENTS = 3


def arbitrary(body):
    """Return an answer of the right form that depends on nothing but the request."""
    system = body["messages"][0]["content"]
    seed = int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(seed)
    if '"intruder"' in system:
        return {"intruder": int(rng.integers(1, 6))}
    n = int(re.findall(r"with (\d+) numbers", system)[0])
    return {"answers": rng.integers(0, 11 if "up to 10" in system else 2, n).tolist()}


def bad(body):
    """Return whether this request gets an answer of no use: about one in six."""
    return hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[5] < 42


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The corpus, what fires in it, the samples, the scores, the counts, and the bodies of all requests."""
    corpus = make_corpus()
    token = corpus.tokens
    after = np.concatenate([[False], token[:-1] == OPEN])
    firings = fire(corpus, np.isin(token, [DEF, CLASS]), after, (token == DEF) & after)
    settings = SampleSettings(n_score=12, n_quantiles=4, n_trials=6, neighbours=None, seed=3)
    samples = [LatentSampler(corpus, firings, settings).draw(number) for number in range(N_LATENTS)]
    contexts = WindowTexts(corpus, TokenTexts(dict(enumerate(WORDS)), {}))
    sums, counts = ScoreSums(corpus.test.n_groups, N_LATENTS), Counts.none(N_LATENTS)

    def act(body, number):
        return answer("I would rather not." if bad(body) else json.dumps(arbitrary(body)))

    path = tmp_path_factory.mktemp("answers") / "answers.sqlite"
    with ScriptedServer(act) as server, AnswerCache(path) as cache, ExitStack() as opened:
        llm = LlmConfig(base_url=server.url, model="m", contexts_per_call=5, n_simulated=8)
        client = LlmClient(llm, cache, seed=0)
        opened.callback(client.close)
        judge = Judge(llm, contexts, firings, samples, 4, 0)
        said = {number: f"explanation {number}." for number in range(N_LATENTS)}
        for score in SCORES:
            judge.score(client, said, score, sums, counts)
    return corpus, firings, samples, sums.table(300, 0), counts, server.bodies


def windows_by_text(corpus):
    found = {}
    for window in range(corpus.first_test_window, corpus.n_windows):
        rows = corpus.window_start[window] + np.arange(WINDOW)
        rows = rows[corpus.usable[rows]]
        text = "".join(WORDS[token] for token in corpus.tokens[rows])
        assert text not in found
        found[text] = rows
    return found


def shown(body):
    """Return the numbered texts of a request."""
    lines = body["messages"][1]["content"].split("\n")
    return [json.loads(line.split(". ", 1)[1]) for line in lines if re.match(r"\d+\. ", line)]


def of_latent(bodies, number, phrase):
    return [b for b in bodies if phrase in b["messages"][0]["content"] and f"explanation {number}." in str(b)]


@pytest.mark.parametrize(("score", "phrase"), [("detection", "on any of its tokens"), ("fuzzing", "fits the marked")])
def test_yes_and_no(judged, score, phrase):
    corpus, firings, samples, scores, _, bodies = judged
    rows_of = windows_by_text(corpus)
    for number in range(N_LATENTS):
        row, value = firings.of(number)
        threshold = 0.3 * value[row < corpus.n_train].max()
        truth, said, seen = [], [], []
        for body in of_latent(bodies, number, phrase):
            for marked, yes in zip(shown(body), arbitrary(body)["answers"], strict=True):
                text = marked.replace("<<", "").replace(">>", "")
                rows = rows_of[text]
                seen.append(text)
                fires = np.isin(rows, row)
                if score == "fuzzing" and fires.any():
                    strong = np.isin(rows, row[value > threshold])
                    pieces = [WORDS[token] for token in corpus.tokens[rows]]
                    ends = np.cumsum([len(piece) for piece in pieces])
                    if strong.any():
                        assert re.sub("<<|>>", "", marked) == text
                        assert [p for p, s in zip(pieces, strong, strict=True) if s] == _marked(marked, ends, pieces)
                if not bad(body):
                    truth.append(fires.any())
                    said.append(bool(yes))
        assert len(set(seen)) == len(seen) == len(samples[number].windows)
        truth, said = np.array(truth), np.array(said)
        assert 0 < len(truth) < len(seen) or not any(bad(body) for body in of_latent(bodies, number, phrase))
        assert scores[score][number] == pytest.approx((said[truth].mean() + (~said[~truth]).mean()) / 2)
        assert scores[f"{score}_low"][number] <= scores[score][number] <= scores[f"{score}_high"][number]


def _marked(text, ends, pieces):
    """Return the tokens between marks."""
    inside, at, places = False, 0, set()
    for part in re.split("(<<|>>)", text):
        if part in ("<<", ">>"):
            inside = part == "<<"
            continue
        if inside:
            places |= {place for place, end in enumerate(ends) if at < end <= at + len(part)}
        at += len(part)
    return [pieces[place] for place in sorted(places)]


def test_simulation(judged):
    corpus, firings, samples, scores, _, bodies = judged
    rows_of = windows_by_text(corpus)
    for number in range(N_LATENTS):
        row, value = firings.of(number)
        activation = np.zeros(corpus.n_rows)
        activation[row] = value
        asked = of_latent(bodies, number, "Predict the activation")
        n_active = int(samples[number].active.sum())
        assert len(asked) == min(4, n_active) + 4
        used = [body for body in asked if not bad(body)]
        actual = np.concatenate([activation[rows_of["".join(shown(body))]] for body in used])
        expected = np.concatenate([arbitrary(body)["answers"] for body in used])
        assert scores["simulation"][number] == pytest.approx(np.corrcoef(actual, expected)[0, 1])


def test_intruder(judged):
    corpus, firings, samples, scores, _, bodies = judged
    rows_of = windows_by_text(corpus)
    asked = {json.dumps(shown(body)): body for body in bodies if "the intruder" in body["messages"][0]["content"]}
    assert len(samples[0].trials) == len(samples[1].trials) == 6
    for number in (0, 1):
        row, _ = firings.of(number)
        right = []
        for texts, body in asked.items():
            plain = [re.sub("<<|>>", "", text) for text in json.loads(texts)]
            windows = [int(corpus.window_of[rows_of[text][0]]) for text in plain]
            if not any(np.array_equal(trial.windows, windows) for trial in samples[number].trials) or bad(body):
                continue
            [intruder] = [at for at, text in enumerate(plain) if not np.isin(rows_of[text], row).any()]
            right.append(arbitrary(body)["intruder"] == intruder + 1)
        assert scores["intruder"][number] == pytest.approx(np.mean(right))


def test_bad_answers_are_counted_per_latent(judged):
    *_, counts, bodies = judged
    assert counts.answers.sum() == len(bodies)
    assert counts.bad.sum() == counts.reasons["no JSON"] == sum(bad(body) for body in bodies) > 0
