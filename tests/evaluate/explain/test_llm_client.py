"""The client of language models against a scripted server that fails, stalls, limits, refuses and answers nonsense."""

from __future__ import annotations

import email.utils
import threading
import time
from types import SimpleNamespace

import pytest

from thresher.evaluate.explain.llm import answers, limits
from thresher.evaluate.explain.llm.answers import BadAnswerError
from thresher.evaluate.explain.llm.cache import AnswerCache
from thresher.evaluate.explain.llm.client import LlmClient, retry_after
from thresher.evaluate.explain.llm.config import LlmConfig
from thresher.evaluate.explain.llm.request import Answer, ChatRequest
from thresher.shared.core.errors import ConfigError, LlmError, OutputBusyError, ThresherError

from .scripted_server import ScriptedServer, answer, failure, good

KEY = "sk-very-secret-0123456789"


def requests(n, size=0):
    return [ChatRequest("detection", "with 1 numbers", f"{i}" + "x" * size, 10) for i in range(n)]


def plain(body, number):
    return answer(f"{body['messages'][1]['content'][:8]}")


@pytest.fixture
def cache(tmp_path):
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        yield cache


@pytest.fixture(autouse=True)
def _close_clients():
    yield
    while OPENED:
        OPENED.pop().close()


OPENED: list[LlmClient] = []


def client(server, cache, **changes):
    settings = {"base_url": server.url, "model": "m", "backoff": 0.01, "timeout": 5.0, "concurrency": 4} | changes
    OPENED.append(LlmClient(LlmConfig(**settings), cache, seed=3))
    return OPENED[-1]


def ask(found, some):
    return [None if one is None else one.text for one in found.ask(some, "ask")]


def test_answers_come_in_order_and_once(cache):
    with ScriptedServer(plain) as server:
        first = client(server, cache)
        assert ask(first, requests(20) + requests(3)) == [*map(str, range(20)), "0", "1", "2"]
        assert len(server.bodies) == 20
        assert server.most <= 4
        assert (first.budget.prompt_tokens, first.budget.completion_tokens) == (2000, 200)
        body = server.bodies[0]
        assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0.0, 3, 10)
        again = client(server, cache)
        assert ask(again, requests(20)) == [*map(str, range(20))]
        assert len(server.bodies) == 20
        assert ask(client(server, cache, model="other"), requests(1)) == ["0"]
        assert len(server.bodies) == 21


@pytest.mark.parametrize("fault", ["500", "429", "close", "stall", "nonsense", "other JSON"])
def test_faults_are_retried(cache, fault):
    released = threading.Event()

    def act(body, number):
        if number >= 2:
            return plain(body, number)
        if fault == "stall":
            released.wait(10)
            return "close"
        return {
            "500": failure(500),
            "429": failure(429, Retry_After="0"),
            "close": "close",
            "nonsense": (200, "<html>", {"Content-Type": "text/html"}),
            "other JSON": (200, "{}", {}),
        }[fault]

    with ScriptedServer(act) as server:
        assert ask(client(server, cache, concurrency=1, timeout=0.3), requests(2)) == ["0", "1"]
        assert len(server.bodies) == 4
        released.set()


def test_retry_after_holds_for_all(cache):
    def act(body, number):
        return failure(429, Retry_After="1") if number == 0 else plain(body, number)

    with ScriptedServer(act) as server:
        assert len(ask(client(server, cache, concurrency=1), requests(3))) == 3
        assert server.times[1] - server.times[0] >= 0.99
    assert retry_after("2.5") == 2.5
    assert retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert retry_after("soon") is None


def test_after_the_last_retry_it_stops_and_keeps_what_came(cache):
    with ScriptedServer(lambda body, n: plain(body, n) if n < 5 else failure(503)) as server:
        with pytest.raises(LlmError, match=r"no answer from .* after 3 tries \(HTTP 503\)"):
            ask(client(server, cache, retries=2, concurrency=1), requests(9))
        server.act = plain
        assert len(ask(client(server, cache), requests(9))) == 9
        assert len(server.answered) == len(set(server.answered)) == 9


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusals_of_the_server_stop_at_once_and_never_show_the_key(cache, tmp_path, monkeypatch, status, capsys):
    monkeypatch.setenv("SOME_KEY", KEY)
    with ScriptedServer(lambda body, n: failure(status, f"bad key {KEY}")) as server:
        with pytest.raises(LlmError, match=f"HTTP {status}") as caught:
            ask(client(server, cache, api_key_env="SOME_KEY", concurrency=1), requests(1))
        assert len(server.bodies) == 1
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert KEY not in "".join(capsys.readouterr())


def test_the_key_never_reaches_the_disk(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    with ScriptedServer(lambda body, n: answer(f"you sent {KEY}")) as server:
        assert ask(client(server, cache, api_key_env="SOME_KEY"), requests(2)) == ["you sent [key]"] * 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_key_that_is_not_set_is_refused(cache, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with ScriptedServer(plain) as server, pytest.raises(ConfigError, match="SOME_KEY, which api_key_env names"):
        client(server, cache, api_key_env="SOME_KEY")


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_budget_of_tokens_is_never_exceeded(cache, concurrency):
    with ScriptedServer(plain) as server:
        found = client(server, cache, max_tokens=1000, concurrency=concurrency)
        got = ask(found, requests(40, size=100))
        assert found.exhausted
        assert 7 <= sum(one is not None for one in got) <= 9
        assert 110 * len(server.bodies) <= 1000
        assert found.budget.prompt_tokens + found.budget.completion_tokens <= 1000
        n = len(server.bodies)
        again = client(server, cache, max_tokens=1000)
        ask(again, requests(40, size=100))
        assert len(server.bodies) == n  # what was paid before counts
        larger = client(server, cache, max_tokens=100_000)
        assert None not in ask(larger, requests(40, size=100))
        assert len(server.bodies) == 40


def test_the_budget_of_money(cache):
    with ScriptedServer(plain) as server:
        found = client(server, cache, max_cost=0.01, input_price=10.0, output_price=100.0)
        ask(found, requests(40, size=100))
        assert found.exhausted
        cost = found.budget.cost(found.budget.prompt_tokens, found.budget.completion_tokens)
        assert cost == pytest.approx(len(server.bodies) * (100 * 10 + 10 * 100) / 1e6)
        assert 0.005 < cost <= 0.01


def test_answers_without_usage_count_in_full(cache):
    with ScriptedServer(lambda body, n: answer("x", usage=False)) as server:
        found = client(server, cache)
        ask(found, requests(1))
        assert found.budget.completion_tokens == 10
        assert found.budget.prompt_tokens >= requests(1)[0].n_bytes


@pytest.mark.parametrize(("limit", "gap"), [((600, None), 0.1), ((None, 30_000), 0.25), ((600, 30_000), 0.25)])
def test_requests_are_spaced_by_the_rate(monkeypatch, limit, gap):
    """By a clock that only waiting moves; each request has 125 tokens."""
    now = [100.0]

    class Stop(threading.Event):
        def wait(self, timeout=None):
            now[0] += timeout
            return False

    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rate, sent = limits.RateLimit(*limit), []
    for _ in range(6):
        rate.wait(125, Stop())
        sent.append(now[0])
    assert sent == pytest.approx([100.0 + gap * number for number in range(6)])
    rate.pause(2.0)
    rate.wait(125, Stop())
    assert now[0] == pytest.approx(sent[-1] + 2.0)


def test_each_request_waits_for_its_turn(cache, monkeypatch):
    waited = []
    monkeypatch.setattr(limits.RateLimit, "wait", lambda self, tokens, stop: waited.append(tokens))
    with ScriptedServer(plain) as server:
        ask(client(server, cache, tokens_per_minute=30_000), requests(6))
    assert waited == [one.likely_tokens + 10 for one in requests(6)]


def test_two_processes_do_not_share_a_cache(cache):
    with pytest.raises(OutputBusyError):
        AnswerCache(cache.path)


def test_a_damaged_cache_is_one_line(tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ThresherError, match="delete it"):
        AnswerCache(tmp_path / "answers.sqlite")


def read(text, finish_reason="stop", refusal=False):
    return Answer(text, finish_reason, refusal, 1, 1)


@pytest.mark.parametrize(
    ("text", "n", "found"),
    [
        ('{"answers": [1, 0]}', 2, [True, False]),
        ('Sure!\n```json\n{"answers": [0, 1, 1]}\n```', 3, [False, True, True]),
        ('{"why": {"a": 1}} {"answers": [true]}', 1, [True]),
    ],
)
def test_good_answers(text, n, found):
    assert answers.yes_or_no(read(text), n) == found


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (read('{"answers": [1]}'), "wrong JSON"),
        (read('{"answers": [1, 2]}'), "wrong JSON"),
        (read('{"answers": "yes"}'), "wrong JSON"),
        (read('{"answers": [1, 0]} or {"answers": [0, 0]}'), "wrong JSON"),
        (read("yes and no"), "no JSON"),
        (read('{"answers": [1,', "length"), "truncated"),
        (read("I cannot help", refusal=True), "refusal"),
        (read(""), "no JSON"),
        (read("{" * 5000), "no JSON"),
    ],
)
def test_bad_answers_say_why(given, reason):
    with pytest.raises(BadAnswerError, match=reason):
        answers.yes_or_no(given, 2)


def test_other_answers():
    assert answers.explanation(read('{"explanation": " a \\n b "}')) == "a b"
    assert answers.choice(read('{"intruder": 5}'), 5) == 4
    assert answers.activations(read('{"answers": [0, 10, 2.5]}'), 3) == [0, 10, 2.5]
    for bad in ('{"intruder": 6}', '{"intruder": true}', '{"intruder": 0}'):
        with pytest.raises(BadAnswerError):
            answers.choice(read(bad), 5)
    assert good({"messages": [{"content": "with 2 numbers"}, {"content": ""}]}) == '{"answers": [1, 1]}'
