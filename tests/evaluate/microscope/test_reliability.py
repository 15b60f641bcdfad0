"""Kills, a model that does not load, cancelled requests, full queues, and many clients at once."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from thresher.evaluate.explain.notes import Notes, notes_path, shown_explanations
from thresher.evaluate.features.files import FeatureIndex
from thresher.evaluate.microscope.data.run_folder import find_evaluation, open_run
from thresher.evaluate.microscope.data.saes import SaeShelf
from thresher.evaluate.microscope.model.loaded import LoadedModel
from thresher.evaluate.microscope.search.prepare import Preparation
from thresher.shared.core.errors import ConfigError, MissingFileError
from thresher.shared.store import ActivationStore

MODEL = Path(__file__).parents[3] / "models" / "stdlib-lm"


@pytest.fixture
def copied(run_folder, tmp_path):
    """A copy of the evaluation, to be changed."""
    shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("microscope"))
    return tmp_path / "run"


WRITER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from thresher.evaluate.explain.notes import Notes
notes = Notes(Path(sys.argv[1]))
for latent in range(10**9):
    notes.put("sae", latent, label=f"label {latent}", comment="x" * 2000, starred=True)
    print(latent, flush=True)
"""


def test_a_kill_while_notes_are_saved_loses_none_that_was_saved(tmp_path):
    path = tmp_path / "notes.sqlite"
    command = [sys.executable, "-P", "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        saved = [int(child.stdout.readline()) for _ in range(25)][-1]
        child.send_signal(signal.SIGKILL)
        saved = max([saved, *map(int, child.stdout.read().split())])
    kept = Notes(path).all("sae")
    assert [note["latent"] for note in kept[: saved + 1]] == list(range(saved + 1))
    assert len(kept) <= saved + 2, "at most the note that was being saved"
    assert all(note["label"] == f"label {note['latent']}" for note in kept)
    assert Notes(path).put("sae", 0, label="again")["label"] == "again"


def test_the_command_prints_its_address_once_it_answers_and_ends_on_interrupt(copied):
    code = "from thresher.shared.core.cli import run; run()"
    command = [sys.executable, "-P", "-c", code, "microscope", str(copied), "--port", "0", "--open", "false"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = child.stdout.readline().split()[-1]
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/api/saes")
    assert len(json.loads(connection.getresponse().read())["saes"]) == 3
    connection.close()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize("stops", [True, False])
def test_an_encoder_that_fails_is_reported_unless_the_server_ends(stops, caplog):
    """At the end of a process no thread can start another, and so a library cannot load a model."""

    def open_encoder():
        if stops:
            preparation.stop()
        raise RuntimeError("cannot schedule new futures after shutdown")

    tables = SimpleNamespace(run=SimpleNamespace(indexes={}))
    preparation = Preparation(tables, Path(), open_encoder, embedded_latents=10, busy=lambda: False)
    preparation.run()
    assert bool(caplog.records) != stops
    assert bool(preparation.state.note) != stops


def test_model_and_encoder_are_not_loaded_at_once(serve, copied, monkeypatch):
    """transformers changes global state while it loads: two at once left a model without its tied weights."""
    inside, met, real = set(), [], AutoModelForCausalLM.from_pretrained

    def enter(who):
        inside.add(who)
        for _ in range(20):  # long enough for the other one to come in, if nothing stops it
            met.extend(inside - {who})
            threading.Event().wait(0.02)
        inside.remove(who)

    def open_model(*given, **settings):
        enter("model")
        return real(*given, **settings)

    def open_encoder(*given, **settings):
        enter("encoder")
        raise OSError("no encoder")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", open_model)
    monkeypatch.setattr(AutoModel, "from_pretrained", open_encoder)
    client = serve(run=str(copied), encoder=str(MODEL), device="cpu").client
    note = f"cannot load the sentence encoder '{MODEL}': no encoder"
    client.wait(lambda status: status["model"]["state"] == "ready" and status["search"]["note"] == note)
    assert met == []


def test_without_a_model_everything_but_the_model_works(serve, copied):
    client = serve(run=str(copied), encoder=False, model=str(copied / "no-model")).client
    status = client.wait(lambda status: status["model"]["state"] == "missing" and status["search"]["words"] == 1)
    assert "no-model" in status["model"]["reason"]
    assert client.json("GET", "/api/saes/topk_k2/latents/3")["latent"] == 3
    assert client.json("GET", "/api/search?q=def")["results"]
    assert client.json("GET", "/api/saes/topk_k2/latents/3/matches")["matches"]
    assert client.json("PUT", "/api/notes", {"sae": "topk_k2", "latent": 3, "label": "kept"})["note"]
    assert "the model is not there" in client.json("POST", "/api/activations", {"text": "def"}, status=422)["error"]
    assert "the model is not there" in client.json("POST", "/api/steer", {"prompt": "def"}, status=422)["error"]


def test_saes_whose_weights_are_gone_are_browsed_and_not_run(serve, copied, sweep, tmp_path):
    moved = tmp_path / "saes"
    shutil.copytree(sweep, moved)
    config = copied / "evaluation" / "config.toml"
    config.write_text(config.read_text().replace(str(sweep), str(moved)))
    shutil.rmtree(moved / "topk_k2")
    client = serve(run=str(copied), encoder=False, device="cpu").client
    client.wait(lambda status: status["model"]["state"] == "ready")
    assert [sae["name"] for sae in client.json("GET", "/api/saes")["saes"] if not sae["has_weights"]] == ["topk_k2"]
    assert client.json("GET", "/api/saes/topk_k2/latents/3")["latent"] == 3
    assert "no longer where" in client.json("GET", "/api/saes/topk_k2/latents/3/matches", status=404)["error"]
    assert client.json("POST", "/api/activations", {"text": "def"})["saes"].keys() == {"standard", "topk_k10"}
    steer = {"prompt": "def", "edits": [{"sae": "topk_k2", "latent": 1}]}
    assert "no longer where" in client.json("POST", "/api/steer", steer, status=404)["error"]


def test_a_label_stands_before_the_explanations_of_its_own_index_only(run_folder, copied):
    index = FeatureIndex.open(next((copied / "evaluation" / "features").glob("topk_k2.parquet")))
    notes = Notes(notes_path(copied / "evaluation"))
    notes.put("topk_k2", 3, label="opens files", comment="checked", fingerprint=index.metadata["fingerprint"])
    notes.put("topk_k2", 4, label="of an earlier index", fingerprint="another")
    notes.put("topk_k10", 5, label="of another SAE", fingerprint=index.metadata["fingerprint"])
    shown = shown_explanations(index)
    assert [line["explanation"] for line in shown[3]] == ["opens files. checked"]
    assert shown.keys() == {3}


def test_a_run_is_found_by_its_folder_or_its_evaluation(run_folder, tmp_path):
    evaluation = run_folder / "evaluation"
    assert find_evaluation(run_folder) == find_evaluation(evaluation) == evaluation
    with pytest.raises(MissingFileError, match="no folder"):
        find_evaluation(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="no evaluation in"):
        find_evaluation(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(evaluation, tmp_path / "several" / name)
    with pytest.raises(ConfigError, match=r"several evaluations; give one of them: .*one, .*two"):
        find_evaluation(tmp_path / "several")
    assert list(open_run(tmp_path / "several" / "one").indexes) == list(open_run(run_folder).indexes)


def test_paths_of_a_configuration_are_found_from_another_folder(run_folder, sweep, copied, tmp_path, monkeypatch):
    shutil.copytree(sweep, copied / "saes")
    config = copied / "evaluation" / "config.toml"
    config.write_text(config.read_text().replace(str(sweep), "run/saes"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert set(open_run(copied).saes) == {"standard", "topk_k2", "topk_k10"}


def test_one_who_leaves_cancels_and_a_full_queue_is_refused(serve, run_folder):
    from thresher.evaluate.microscope.model.worker import CancelledJobError

    found = serve(run=str(run_folder), encoder=False, device="cpu", max_waiting=2)
    client, worker = found.client, found.services.worker
    client.wait(lambda status: status["model"]["state"] == "ready")
    holding, go_on = threading.Event(), threading.Event()

    class Held:
        """A job that holds the worker until it is told to go on."""

        def run(self, _):
            holding.set()
            go_on.wait(60)

        def cancel(self):
            go_on.set()

    with worker._changed:
        worker._waiting.append(Held())
        worker._changed.notify()
    holding.wait(60)
    body = json.dumps({"prompt": "from path", "sampling": {"max_new_tokens": 3}}).encode()
    connections = []
    for ahead in (1, 2):
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", "/api/steer", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline() == b"event: queued\n"
        assert json.loads(answer.readline().split(b" ", 1)[1])["ahead"] == ahead
        connections.append((connection, answer))
    assert "wait for the model" in client.json("POST", "/api/steer", {"prompt": "self"}, status=503)["error"]
    first = worker._waiting[0]
    connections[0][1].close()
    connections[0][0].close()
    client.wait(lambda _: first._gone.is_set())
    with pytest.raises(CancelledJobError):
        first.check()
    go_on.set()
    assert b"event: done" in connections[1][1].read()
    connections[1][0].close()
    client.wait(lambda status: not status["model"]["running"] and status["model"]["waiting"] == 0)


def test_texts_begin_as_those_of_the_store_do(copied, tiny):
    """A store may name another BOS token than the tokenizer has; SAEs read neither it nor other masked tokens."""
    source = open_run(copied).model
    assert source.masked == tuple(ActivationStore.open(tiny.store).mask_token_ids) == (0,)
    lm = LoadedModel.open(
        replace(source, bos=5, masked=(5, 1)),
        SaeShelf(open_run(copied).saes),
        lambda name: torch.ones(32),
        device="cpu",
        max_tokens=12,
        trust_remote_code=False,
    )
    assert lm.tokens("def class") == [5, 1, 2]
    assert lm.usable(torch.tensor([5, 1, 2])).tolist() == [False, False, True]
    assert lm.with_saes(["topk_k2"])[0].skipped == 5


def test_work_that_takes_too_long_ends_with_the_limit(serve, run_folder):
    client = serve(run=str(run_folder), encoder=False, device="cpu", max_seconds=1e-9).client
    client.wait(lambda status: status["model"]["state"] == "ready")
    assert "the limit of one request" in client.json("POST", "/api/activations", {"text": "def"}, status=422)["error"]


def test_many_clients_at_once_are_all_answered_and_leave_nothing_behind(scope):
    client = scope.client
    paths = [
        "/api/saes",
        "/api/saes/topk_k2/latents/3",
        "/api/saes/topk_k10/latents?limit=9",
        "/api/search?q=word20",
        "/",
    ]
    expected = {path: client.send("GET", path)[2] for path in paths}
    texts = {text: client.json("POST", "/api/activations", {"text": text}) for text in ("def class", "yield raise")}

    def ask(number):
        path = paths[number % len(paths)]
        same = client.send("GET", path)[::2] == (200, expected[path])
        if number % 10 == 0:
            text = list(texts)[number // 10 % 2]
            status, _, content = client.send("POST", "/api/activations", {"text": text})
            same = same and (status == 503 or json.loads(content) == texts[text])
        return same

    handles = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    with ThreadPoolExecutor(50) as pool:
        assert all(pool.map(ask, range(400)))
    client.wait(lambda status: not status["model"]["running"])
    if handles:
        assert len(os.listdir("/proc/self/fd")) < handles + 100
