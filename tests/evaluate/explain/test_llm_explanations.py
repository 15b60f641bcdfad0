"""Explanations and scores by a language model: a scripted server that knows why latents fire, kills, and budgets."""

from __future__ import annotations

import base64
import gzip
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from thresher.evaluate.explain.config import ExplainConfig
from thresher.evaluate.explain.llm import prompts
from thresher.evaluate.explain.run import explain
from thresher.evaluate.explain.window_texts import whole_graphemes
from thresher.shared.core.cli import PARTLY_FAILED, run_guarded
from thresher.shared.core.errors import ConfigError

from .scripted_server import ScriptedServer, answer, failure, good

SETTINGS = {"saes": ["topk_k10"], "window": 6, "n_score": 8, "bootstrap_samples": 50, "n_intruder_trials": 4}
ALL = ["detection", "fuzzing", "simulation", "intruder"]


def config(evaluation, server, **changes):
    llm = {"base_url": server.url, "model": "m", "backoff": 0.01, "max_latents": 5, "scores": ALL} | changes
    return ExplainConfig(evaluation=str(evaluation), **SETTINGS, llm=llm)


@pytest.fixture
def fresh(evaluation):
    """The evaluation without explanations or answers."""
    for path in (evaluation / "explanations").glob("*"):
        path.unlink()
    return evaluation


def lines(path):
    return pq.read_table(path).to_pylist()


def test_explanations_scores_and_baselines_by_a_model(fresh):
    with ScriptedServer(lambda body, n: answer(good(body))) as server:
        found = explain(config(fresh, server))
    assert found.complete
    table = lines(found["topk_k10"])
    own = [line for line in table if line["explainer"] == "m"]
    assert len(own) == 5
    baselines = {line["explainer"] for line in table if line["is_baseline"]}
    assert {"token frequency, judged by m", "random latent, judged by m"} < baselines
    for line in own:
        assert line["explanation"] == "numbers such as 1"
        assert line["prompts"] == prompts.PROMPTS
        # Whoever says yes to everything is right on half, and predicts the same everywhere.
        assert line["detection"] == line["fuzzing"] == 0.5
        assert line["simulation"] == 0
        assert line["n_bad_answers"] == 0
        assert line["n_answers"] > 4
    assert [line for line in table if line["explainer"] == "rules"]
    packed = re.search(r'id="block-sae0-0"[^>]*>([^<]+)<', (fresh / "report.html").read_text())
    assert packed
    shown = json.loads(gzip.decompress(base64.b64decode(packed[1])))[own[0]["latent"]]["explanations"]
    assert ["m", "numbers such as 1"] in [part[:2] for part in shown]
    assert {part[0] for part in shown} >= {"rules", "token frequency, judged by m", "random latent, judged by m"}
    batch = gzip.decompress((fresh / "neuronpedia/topk_k10/explanations/batch-0.jsonl.gz").read_bytes())
    exported = [json.loads(line) for line in batch.splitlines()]
    by_model = [line for line in exported if line["explanationModelName"] == "m"]
    assert {int(line["index"]) for line in by_model} == {line["latent"] for line in own}
    assert {line["description"] for line in by_model} == {"numbers such as 1"}
    assert {line["explanationModelName"] for line in exported} == {"m", "rules"}  # and no baseline


def test_a_judge_that_knows_scores_one(fresh):
    """The judge answers from the activations themselves, which it finds by the text of the windows."""
    truth = {}

    def act(body, number):
        system, user = (message["content"] for message in body["messages"])
        if '"explanation"' in system or "with" not in system:
            return answer(good(body))
        shown = [json.loads(line.split(" ", 1)[1]) for line in user.splitlines() if re.match(r"\d+\. ", line)]
        return answer(json.dumps({"answers": [truth[text] for text in shown]}))

    import thresher.evaluate.explain.judge as judge

    class Spy(judge.Judge):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            [number] = self.chosen()
            sample = self.samples[number]
            for window, active in zip(sample.windows.tolist(), sample.active.tolist(), strict=True):
                truth["".join(self.contexts.pieces(window))] = int(active)

    import thresher.evaluate.explain.run as run

    with pytest.MonkeyPatch.context() as patch, ScriptedServer(act) as server:
        patch.setattr(run, "Judge", Spy)
        found = explain(config(fresh, server, max_latents=1, scores=["detection"], judged=["llm"]))
    [line] = [line for line in lines(found["topk_k10"]) if line["explainer"] == "m"]
    assert line["detection"] == 1.0


def test_bad_answers_are_counted_and_not_guessed(fresh, capsys):
    def act(body, number):
        if '"explanation"' in body["messages"][0]["content"]:
            return answer(good(body))
        return [answer("no idea"), answer('{"answers": [1'), answer("", refusal="no"), answer('{"x": 1}')][number % 4]

    with ScriptedServer(act) as server:
        found = explain(config(fresh, server, concurrency=1))
    own = [line for line in lines(found["topk_k10"]) if line["explainer"] == "m"]
    for line in own:
        assert line["detection"] is line["fuzzing"] is line["simulation"] is line["intruder"] is None
        assert line["n_bad_answers"] == line["n_answers"] - 1
    assert "refusal" in capsys.readouterr().out


def test_a_budget_stops_cleanly_and_more_of_it_completes(fresh, capsys):
    with ScriptedServer(lambda body, n: answer(good(body))) as server:
        small = config(fresh, server, max_tokens=12_000)
        found = explain(small)
        assert not found.complete
        assert 0 < 110 * len(server.bodies) <= 12_000
        said = capsys.readouterr()
        assert "estimate topk_k10" in said.out
        assert "stopped at the budget" in said.err
        assert any(line["explainer"] == "m" for line in lines(found["topk_k10"]))
        found = explain(config(fresh, server))
        assert found.complete
        assert len(server.answered) == len(set(server.answered)) == len(server.bodies)
        n = len(server.bodies)
        cut = lines(found["topk_k10"])
        for path in (fresh / "explanations").glob("*.parquet"):
            path.unlink()
        explain(config(fresh, server))
        assert len(server.bodies) == n
        assert lines(found["topk_k10"]) == cut


def test_an_estimate_asks_nothing(fresh, capsys):
    with ScriptedServer(lambda body, n: answer(good(body))) as server:
        explain(config(fresh, server, estimate_only=True, input_price=1.0, output_price=2.0))
        assert not server.bodies
        said = capsys.readouterr().out
        estimated = int(re.findall(r": ([\d,]+) calls", said)[0].replace(",", ""))
        explain(config(fresh, server))
        # Equal explanations make equal questions, which are asked once.
        assert len(server.bodies) <= estimated
    assert "cost about" in said


@pytest.mark.parametrize("answered", [1, 25])
def test_killed_anywhere_no_answer_is_paid_twice(fresh, tmp_path, answered):
    released = threading.Event()

    def act(body, number):
        if number >= answered and not released.is_set():
            released.wait(60)
            return failure(503)  # the client is dead by then
        return answer(good(body))

    with ScriptedServer(act) as server:
        settings = tmp_path / "explain.toml"
        settings.write_text(
            f'evaluation = "{fresh}"\nsaes = ["topk_k10"]\nwindow = 6\nn_score = 8\nbootstrap_samples = 0\n'
            f'n_intruder_trials = 4\n[llm]\nbase_url = "{server.url}"\nmodel = "m"\nconcurrency = 4\nmax_latents = 5\n'
        )
        command = [str(Path(sys.executable).with_name("thresher")), "explain", str(settings)]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # A thread asks again only when the answer before is on disk, so with four in flight all others are.
        deadline = time.monotonic() + 60
        while not (len(server.answered) == answered and server.now == 4):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        first = list(server.answered)
        released.set()
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert len(server.answered) > len(first)
    assert len(set(server.answered)) == len(server.answered)


def test_what_the_table_refuses(evaluation):
    with pytest.raises(ConfigError, match="max_cost needs input_price"):
        ExplainConfig(evaluation="x", llm={"base_url": "http://x/v1", "model": "m", "max_cost": 1.0})
    with pytest.raises(ConfigError, match="base_url: expected a URL"):
        ExplainConfig(evaluation="x", llm={"base_url": "x", "model": "m"})
    with ScriptedServer(lambda body, n: failure(401)) as server:
        assert run_guarded(lambda: explain(config(evaluation, server))) == 2
    assert PARTLY_FAILED == 3


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["👩", "\u200d", "👧", " x"], ["👩\u200d👧", "", "", " x"]),
        (["नि", "\u093f", "त"], ["नि\u093f", "", "त"]),
        (["e", "\u0301t"], ["e\u0301", "t"]),
        (["日", "本"], ["日", "本"]),
        (["", "é"], ["", "é"]),
    ],
)
def test_windows_are_cut_between_graphemes(pieces, expected):
    found = whole_graphemes(pieces)
    assert "".join(found) == "".join(pieces)
    assert found == expected


def test_prompts_mark_tokens_and_choose_marks_that_the_text_has_not():
    request = prompts.fuzz("bits", [["1", " <<", " 2", " да"], ["a", "b", "", "c"]], [[1, 2], [1]], 9)
    assert '1. "1⟦ << 2⟧ да"' in request.user
    assert '2. "a⟦b⟧c"' in request.user
    assert "⟦ and ⟧" in request.system
    shown = prompts.ask_explanation([["x", "\n"]], [{1: 10}], 9)
    assert '1. "x<<\\n>>"\n   "\\n": 10' in shown.user
