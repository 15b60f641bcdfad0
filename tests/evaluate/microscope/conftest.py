"""A run of the tiny model with a tokenizer and three SAEs, evaluated, and a microscope that serves it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thresher.evaluate import EvaluateConfig, evaluate
from thresher.evaluate.microscope.config import MicroscopeConfig
from thresher.evaluate.microscope.run import server_settings
from thresher.evaluate.microscope.server.application import application
from thresher.evaluate.microscope.server.security import Access
from thresher.evaluate.microscope.server.services import Services

from ..chromium import TIMEOUT, record_faults

WORDS = ("<s> def class return import from self open path file read write yield raise").split()  # noqa: SIM905


@pytest.fixture(scope="session")
def speaker(tiny):
    """The tiny model with a tokenizer that reads and writes its fifty words, some of them of Python."""
    n = tiny.model.config.vocab_size
    vocabulary = {f"▁{word}": i for i, word in enumerate(WORDS)}
    vocabulary |= {f"▁word{i}": i for i in range(len(vocabulary), n)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁def"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    folder = tiny.root / "speaker"
    shutil.copytree(tiny.root / "model", folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="▁<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(tiny, sweep, speaker):
    """The folder of an evaluated run."""
    folder = tiny.root / "run"
    settings = {"store": str(tiny.store), "saes": str(sweep), "model": str(speaker), "bootstrap_samples": 0}
    evaluate(EvaluateConfig(output=str(folder / "evaluation"), **settings))
    return folder


TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'user' %}class{% elif turn.role == 'assistant' %}self"
    "{% else %}{{ raise_exception('no turn of ' + turn.role) }}{% endif %} {{ turn.content }} {% endfor %}"
    "{% if add_generation_prompt %}self{% endif %}"
)
"""Of a chat: `class` and `self` say whose turn it is."""


@pytest.fixture(scope="session")
def trained_run(tiny, speaker):
    """A run of `thresher train` that saved its SAEs at two earlier steps, evaluated with a model that chats."""
    from thresher.train import TrainConfig, train

    model, folder = tiny.root / "chats", tiny.root / "trained"
    shutil.copytree(speaker, model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    saes = [
        {"name": "topk", "hook_point": "blocks.1.resid_post", "d_sae": 32, "k": 4},
        {"name": "relu", "architecture": "standard", "hook_point": "blocks.0.resid_post", "d_sae": 24}
        | {"l1_coefficient": 0.5},
    ]
    settings = {"batch_size": 16, "tokens": 16 * 20, "save_every_tokens": 16 * 8}
    train(TrainConfig(store=str(tiny.store), output=str(folder / "saes"), device="cpu", sae=saes, **settings))
    settings = {"store": str(tiny.store), "saes": str(folder / "saes"), "model": str(model), "bootstrap_samples": 0}
    evaluate(EvaluateConfig(output=str(folder / "evaluation"), **settings))
    return folder


class Client:
    """A client of a server, which keeps no connection."""

    def __init__(self, port):
        self.port = port

    def send(self, method, path, body=None, **headers):
        """Send a request; return the status, the headers and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if content is not None:
            named.setdefault("content-type", "application/json")
        try:
            connection.request(method, path, content, named)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, method, path, body=None, status=200, **headers):
        """Send a request that is answered with a status, and return the JSON in it."""
        got, _, content = self.send(method, path, body, **headers)
        assert got == status, content
        return json.loads(content)

    def events(self, path, body):
        """Send a request, and return its server-sent events."""
        status, headers, content = self.send("POST", path, body)
        assert status == 200, content
        assert headers["content-type"].startswith("text/event-stream")
        parts = [
            dict(line.split(": ", 1) for line in part.split("\n")) for part in content.decode().strip().split("\n\n")
        ]
        return [(part["event"], json.loads(part["data"])) for part in parts]

    def wait(self, condition):
        """Ask for the status until a condition on it holds."""
        for _ in range(3000):
            status = self.json("GET", "/api/status")
            if condition(status):
                return status
            time.sleep(0.02)
        raise AssertionError(status)


@pytest.fixture(scope="session")
def serve():
    """The function that serves a run in this process, and returns its services and a client."""
    running = []

    def start(access=None, **settings):
        services = Services.open(MicroscopeConfig(**settings))
        app = application(services, access or Access.of("127.0.0.1", (), None))
        server, listening = uvicorn.Server(server_settings(app)), socket.create_server(("127.0.0.1", 0), backlog=256)
        thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
        services.start()
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = listening.getsockname()[1]
        running.append((server, thread, services, listening))
        return SimpleNamespace(services=services, client=Client(port), port=port)

    yield start
    for server, thread, services, listening in running:
        services.stop()
        server.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(scope="session")
def scope(serve, run_folder):
    """A microscope without a sentence encoder, whose model is loaded and whose words are prepared."""
    found = serve(run=str(run_folder), encoder=False, device="cpu")
    found.client.wait(lambda status: status["model"]["state"] == "ready" and status["search"]["words"] == 1)
    return found


@pytest.fixture(scope="session")
def trained(serve, trained_run):
    """A microscope of the run that was trained."""
    found = serve(run=str(trained_run), encoder=False, device="cpu")
    found.client.wait(lambda status: status["model"]["state"] == "ready" and status["search"]["words"] == 1)
    return found


@pytest.fixture
def open_page(chromium):
    """The function that opens a page of a microscope; what goes wrong in it, or is refused by it, fails the test."""
    contexts, faults = [], []

    def open_at(microscope):
        address = f"http://127.0.0.1:{microscope.port}"
        contexts.append(chromium.new_context(base_url=address, viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        faults.append(record_faults(page, f"{address}/"))
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert [fault for some in faults for fault in some] == []


@pytest.fixture(scope="session")
def expect():
    """Playwright's expectations, which wait."""
    return pytest.importorskip("playwright.sync_api").expect
