"""The GPU benchmark runs every line but its timers here, and one section that fails leaves the others their rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "benchmarks"
PEER = '{"ms": 3.0, "peak_bytes": 1073741824}'


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    # Undone by monkeypatch: one benchmark hides a library of the same name from everything.
    monkeypatch.setitem(sys.modules, "torchvision", sys.modules.get("torchvision"))
    specification.loader.exec_module(module)
    return module


def peer_that_prints(monkeypatch, module, tmp_path, text, status=0):
    script = tmp_path / "peer"
    script.write_text(f"#!/bin/sh\necho '{text}'\necho out of memory >&2\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setattr(module, "PEERS", ("dense",))
    return str(script)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")
def test_every_line_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    module = load("gpu_step", monkeypatch)
    peer = peer_that_prints(monkeypatch, module, tmp_path, PEER)
    output = tmp_path / "out" / "report.json"
    module.main(["--rehearse", "--output", str(output), "--peers", peer])
    assert "every line ran" in capsys.readouterr().out
    (entry,) = json.loads(output.read_text())["sizes"]
    assert set(entry) == {"size", *module.SECTIONS}
    assert entry["peers"] == {"dense": json.loads(PEER)}
    table = output.with_suffix(".md").read_text()
    rows = ("TFLOP/s", "select_batch_topk", "hot latents", "whole step", "jumprelu", "int8 store", "| dense | 3.000 |")
    for row in rows:
        assert row in table


def test_what_fails_says_so_in_its_own_row(tmp_path, monkeypatch):
    module = load("gpu_step", monkeypatch)
    peer = peer_that_prints(monkeypatch, module, tmp_path, "no json", 3)
    options = module.parse(["--peers", peer])
    size = module.SIZES[0]
    failed = module.peers(size, torch.device("cpu"), options)["dense"]["error"]
    assert "status 3" in failed
    assert "out of memory" in failed

    def broken(*arguments):
        raise RuntimeError("a | b")

    monkeypatch.setitem(module.SECTIONS, "step", broken)
    entry = {"size": size._asdict(), "step": module.run_section("step", size, options)}
    entry["peers"] = {"dense": json.loads(PEER), "other": {"error": failed}, "third": {"rehearsed": "third"}}
    assert entry["step"] == {"error": "RuntimeError: a | b"}
    table = module.gpu_tables.markdown({"device": "none", "torch": "0", "sizes": [entry]})
    assert "| step | failed | RuntimeError: a / b |" in table
    assert "| dense | 3.000 | 1.00 GiB |" in table
    assert "| other | failed |" in table
    assert "| third | | rehearsed |" in table


def test_the_table_says_which_targets_are_met(monkeypatch):
    tables = load("gpu_tables", monkeypatch)
    times = {"ms": 1.0, "eager_ms": 1.5, "auxk_ms": 1.2, "n_dead": 9, "peak_bytes": 2 << 30}
    size = {"d_in": 768, "d_sae": 24576, "k": 32, "batch": 4096, "floor_ms": 0.6}
    peers = {name: {"ms": ms, "peak_bytes": 1 << 30} for name, ms in (("sparsify", 2.6), ("sae_lens", 3.9))}
    report = {"device": "none", "torch": "0", "sizes": [{"size": size, "step": times, "peers": peers}]}
    table = tables.markdown(report)
    assert "1.67x the floor of 0.6; target 1.7x: met; 4,096,000 tokens/s" in table
    assert "| sparsify | 2.600 | 2.60x ours, 1.00 GiB; target 2.5x: met |" in table
    assert "| sae_lens | 3.900 | 3.90x ours, 1.00 GiB; target 4.0x: **missed** |" in table
    assert "without a graph | 1.500 | 2.00 GiB at most" in table


def test_the_dense_peer_learns(monkeypatch, capsys):
    peers = load("gpu_peers", monkeypatch)
    step = peers.dense(8, 12, 2, "cpu")
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    weights = [cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Parameter)]
    before = [weight.detach().clone() for weight in weights]
    step(x)
    assert sorted(weight.shape for weight in weights) == [(8,), (12,), (12, 8), (12, 8)]
    assert not any(torch.equal(was, weight) for was, weight in zip(before, weights, strict=True))
    assert any(torch.allclose(weight.norm(dim=-1), torch.ones(12)) for weight in weights)
    monkeypatch.setattr(sys, "argv", ["gpu_peers.py", "dense", "8", "12", "2", "6", "--rehearse"])
    peers.main()
    assert json.loads(capsys.readouterr().out) == {"rehearsed": "dense"}


def test_its_batches_are_as_skewed_as_those_of_trained_saes(monkeypatch):
    module = load("gpu_step", monkeypatch)
    size = module.Size(768, 8192, 32, 128, None)
    parameters, x = module.make_problem(size, torch.device("cpu"))
    latents = (x.float() @ parameters["W_dec"].T).topk(size.k).indices
    counts = torch.bincount(latents.flatten(), minlength=size.d_sae).sort(descending=True).values
    # A twentieth of the latents has about two thirds of the entries, the most frequent is in most rows.
    assert 0.55 < counts[: size.d_sae // 20].sum() / counts.sum() < 0.8
    assert 0.6 < counts[0] / size.batch < 0.95
