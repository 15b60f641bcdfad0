"""`thresher explain` against a real server with a real model: protocol, cache and scores, not insight."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.explain.config import ExplainConfig
from thresher.evaluate.explain.run import explain
from thresher.evaluate.run import evaluate
from thresher.harvest.run import harvest
from thresher.shared.model.loading.gguf import dequantized, gguf_options
from thresher.shared.model.loading.packages import local_model
from thresher.shared.sae import Sae

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model_name():
    """The model of these tests, which must have learnt to chat."""
    from .conftest import named

    return named("smollm2")


@pytest.fixture(scope="module")
def server(model_name, tmp_path_factory):
    """`transformers serve` on loopback: its URL, the name of its model, and its log."""
    pytest.importorskip("fastapi", reason="needs the package fastapi (make test-real)")
    folder = tmp_path_factory.mktemp("served")
    source, file = gguf_options(local_model(model_name))
    model = AutoModelForCausalLM.from_pretrained(source, **file, **dequantized())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **file).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder / "server.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1", str(folder), log
        finally:
            process.terminate()


def _wait_for(url, process, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def evaluation(config, tmp_path):
    """An evaluation of an SAE whose latents are directions in which tokens of the store differ."""
    import msgspec

    harvest(msgspec.structs.replace(config, holdout_fraction=0.3, holdout="contexts"))
    from thresher.shared import ActivationStore

    store = ActivationStore.open(config.store)
    hook_point = config.hook_points[0]
    x = store.read(hook_point, 0, 2048).float()
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    W_dec = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:64]]
    tensors = {
        "W_enc": W_dec.T.contiguous(),
        "W_dec": W_dec,
        "b_enc": torch.zeros(64),
        "b_dec": torch.zeros(x.shape[1]),
    }
    Sae("topk", tensors, hook_point=hook_point, config={"k": 4}).save(tmp_path / "saes" / "directions")
    evaluate(
        EvaluateConfig(
            store=config.store,
            saes=[str(tmp_path / "saes" / "directions")],
            output=str(tmp_path / "evaluation"),
            model=False,
            bootstrap_samples=0,
        )
    )
    return tmp_path / "evaluation"


def n_calls(log):
    return log.read_text().count("POST /v1/chat/completions")


def test_explanations_by_a_real_server(evaluation, server, capsys):
    url, name, log = server
    llm = {"base_url": url, "model": name, "max_latents": 2, "n_explain": 3, "contexts_per_call": 2, "n_simulated": 2}
    llm |= {"scores": ["detection", "fuzzing", "simulation", "intruder"], "judged": ["llm", "rules"]}
    llm |= {"max_explanation_tokens": 60, "max_judgement_tokens": 30, "concurrency": 1, "timeout": 300.0}
    settings = {"evaluation": str(evaluation), "window": 8, "n_score": 2, "n_intruder_trials": 1}
    config = ExplainConfig(**settings, max_latents=8, bootstrap_samples=20, llm=llm)
    found = explain(config)
    assert found.complete
    [path] = found.values()
    asked = n_calls(log)
    assert asked > 2
    said = capsys.readouterr().out
    assert f"{asked:,} calls, 0 answered before" in said
    table = pq.read_table(path).to_pylist()
    judged = [line for line in table if line["explainer"] == f"rules, judged by {name}"]
    assert len(judged) == 2
    for line in [*judged, *(line for line in table if line["explainer"] == name)]:
        assert line["n_answers"] >= line["n_bad_answers"] >= 0
        assert line["n_answers"] > 0
        for score in ("detection", "fuzzing", "intruder"):
            assert line[score] is None or 0 <= line[score] <= 1
        assert line["simulation"] is None or -1 <= line["simulation"] <= 1
    path.unlink()
    again = explain(config)
    assert again.complete
    assert n_calls(log) == asked
    assert "asked" in capsys.readouterr().out
    assert pq.read_table(path).to_pylist() == table
    assert np.isfinite([line["n_answers"] for line in judged]).all()
