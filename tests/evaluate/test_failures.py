"""Evaluations in which an SAE fails, that are interrupted, or that cannot write."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.evaluate import stages
from thresher.evaluate.command import main
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.shared.core.errors import ThresherError
from thresher.shared.sae import Sae
from thresher.shared.sae.formats.files import DIVERGED_NAME
from thresher.shared.store import ActivationStore

MEASURED = ("explained_variance", "l0", "dead_fraction", "ce_loss_score", "kl_div_score", "max_decoder_cosine_mean")


def change_weights(folder, name, change):
    tensors = load_file(folder / "sae_weights.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "sae_weights.safetensors")


@pytest.fixture
def saes(sweep, tmp_path):
    """A copy of the sweep that a test may change."""
    return Path(shutil.copytree(sweep, tmp_path / "saes"))


@pytest.fixture(scope="module")
def healthy(tiny, sweep):
    """The metrics of the unchanged sweep, by name."""
    return {row["name"]: row for row in evaluate(settings(tiny, sweep, tiny.root / "healthy"))}


def settings(tiny, saes, output, **more):
    options = {"feature_rows": 200, "bootstrap_samples": 50} | more
    return EvaluateConfig(store=str(tiny.store), saes=str(saes), output=str(output), **options)


def run(tiny, saes, output, *more):
    given = ["--store", tiny.store, "--saes", saes, "--output", output, "--feature_rows", 200]
    return main([str(argument) for argument in (*given, "--bootstrap_samples", 50, *more)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_an_sae_that_fails_costs_the_others_nothing(tiny, saes, healthy, tmp_path, capsys, value):
    shutil.copytree(tiny.root / "healthy", tmp_path / "out")
    change_weights(saes / "topk_k2", "W_dec", lambda weight: weight.fill_(value))
    assert run(tiny, saes, tmp_path / "out") == 3
    for kind in ("latents", "features"):
        assert {path.stem for path in (tmp_path / "out" / kind).iterdir()} == {"standard", "topk_k10"}
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert set(rows) == set(healthy)
    reason = rows.pop("topk_k2")["error"]
    assert "NaN or infinite" in reason
    for name, row in rows.items():
        assert row["error"] is None
        assert {key: row[key] for key in MEASURED} == {key: healthy[name][key] for key in MEASURED}
    assert f"failed  topk_k2: {reason}" in capsys.readouterr().out
    table = {row["name"]: row for row in pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()}
    assert table["topk_k2"]["error"] == reason
    assert table["topk_k2"]["explained_variance"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>topk_k2 (failed)</dt>" in page
    assert "NaN or infinite" in page


def test_where_every_sae_fails_the_evaluation_does(tiny, saes, tmp_path, capsys):
    for folder in saes.iterdir():
        change_weights(folder, "b_dec", lambda bias: bias.fill_(1e38))
    assert run(tiny, saes, tmp_path / "out") == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: no SAE could be evaluated; 'standard': its latents or")
    assert "(and 2 others failed)" in error
    assert [line.split()[1] for line in warnings] == ["standard", "topk_k2", "topk_k10"]
    assert all(row["error"] for row in json.loads((tmp_path / "out" / "metrics.json").read_text()))


def test_an_sae_that_diverged_in_training_is_named(tiny, saes, tmp_path, capsys):
    (saes / "gone").mkdir()
    (saes / "gone" / DIVERGED_NAME).write_text('{"reason": "loss NaN at step 7", "lr": 1}')
    assert run(tiny, saes, tmp_path / "out", "--model", "false", "--feature_rows", 0) == 0
    assert "diverged in training  gone: loss NaN at step 7" in capsys.readouterr().out
    assert "diverged: loss NaN at step 7" in (tmp_path / "out" / "report.html").read_text()


def test_an_sae_that_diverged_when_it_was_trained_on_is_noted(tiny, saes, tmp_path, capsys):
    """Its folder still has the weights of the shorter run, which are evaluated."""
    folder = next(folder for folder in saes.iterdir() if (folder / "cfg.json").is_file())
    (folder / "diverged.json").write_text('{"reason": "loss NaN at step 70", "lr": 1}')
    assert run(tiny, saes, tmp_path / "out", "--model", "false", "--feature_rows", 0) == 0
    note = "diverged when training continued (loss NaN at step 70); these are its earlier weights"
    said = capsys.readouterr()
    assert note in said.out + said.err
    (row,) = [row for row in json.loads((tmp_path / "out" / "metrics.json").read_text()) if row["name"] == folder.name]
    assert row["notes"] == [note]


def test_predictions_that_are_not_finite_are_no_scores(tiny, saes, healthy, tmp_path, monkeypatch, capsys):
    original = stages.accumulate_losses

    def overflow(*arguments):
        losses = original(*arguments)
        losses["topk_k2"]["kl_sae"][:] = float("nan")
        losses["topk_k2"]["ce_sae"][:] = float("inf")
        return losses

    def cut(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "accumulate_losses", overflow)
        patch.setattr("thresher.evaluate.run.index_features", cut)
        assert run(tiny, saes, tmp_path / "out") == 130
    assert run(tiny, saes, tmp_path / "out") == 3  # what a restart takes over says that it failed, too
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert rows["topk_k2"]["kl_sae"] is rows["topk_k2"]["ce_sae"] is None
    assert rows["topk_k2"]["error"] == "with this SAE spliced in, the model's predictions are NaN or infinite"
    assert rows["topk_k2"]["explained_variance"] == healthy["topk_k2"]["explained_variance"]
    assert rows["topk_k10"]["ce_sae"] == healthy["topk_k10"]["ce_sae"]


def test_a_model_that_is_not_finite_leaves_the_offline_results(tiny, saes, healthy, tmp_path, monkeypatch, capsys):
    original = stages.accumulate_losses

    def overflow(*arguments):
        losses = original(*arguments)
        for sums in losses.values():
            sums["ce_clean"] = sums["ce_clean"] * float("nan")
        return losses

    monkeypatch.setattr(stages, "accumulate_losses", overflow)
    assert run(tiny, saes, tmp_path / "out") == 2
    assert 'try model_dtype = "float32"' in capsys.readouterr().err
    for row in json.loads((tmp_path / "out" / "metrics.json").read_text()):
        assert row["explained_variance"] == healthy[row["name"]]["explained_variance"]


class Interrupted:
    """Cuts an evaluation off in its second stage, and then counts how many SAEs each stage works on."""

    def __init__(self, monkeypatch):
        self.worked: dict[str, list[str]] = {}
        monkeypatch.setattr(stages, "accumulate", self._counting("offline", stages.accumulate))
        monkeypatch.setattr(stages, "accumulate_losses", self._counting("model", stages.accumulate_losses))
        self.cut = True

    def _counting(self, stage, original):
        def work(*arguments):
            saes = arguments[0] if stage == "offline" else arguments[2]
            if stage == "model" and self.cut:
                raise KeyboardInterrupt
            self.worked[stage] = [sae.name for sae in saes]
            return original(*arguments)

        return work


def test_a_restart_uses_what_was_finished(tiny, saes, healthy, tmp_path, monkeypatch):
    interrupted = Interrupted(monkeypatch)
    config = settings(tiny, saes, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["explained_variance"] for row in written] == [row["explained_variance"] for row in healthy.values()]
    interrupted.worked.clear()
    interrupted.cut = False
    rows = evaluate(config)
    assert interrupted.worked == {"model": list(healthy)}
    assert [{**row} for row in rows] == [{**row} for row in healthy.values()]
    assert not list((tmp_path / "out").glob(".*"))
    pairs = pq.read_table(tmp_path / "out" / "dictionaries.parquet")
    assert pairs.equals(pq.read_table(tiny.root / "healthy" / "dictionaries.parquet"))
    interrupted.worked.clear()
    evaluate(config)
    assert interrupted.worked["offline"] == list(healthy), "a finished evaluation is not taken for an interrupted one"


def test_a_restart_repeats_what_changed(tiny, saes, healthy, tmp_path, monkeypatch):
    interrupted = Interrupted(monkeypatch)
    config = settings(tiny, saes, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    change_weights(saes / "topk_k2", "b_dec", lambda bias: bias[-1].add_(0.5))
    (tmp_path / "out" / "latents" / "topk_k10.parquet").write_bytes(b"damaged")
    interrupted.worked.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert interrupted.worked == {"offline": ["topk_k2", "topk_k10"]}
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(tiny, saes, tmp_path / "out", max_rows=100))
    assert interrupted.worked == {"offline": list(healthy)}
    interrupted.cut = False
    rows = {row["name"]: row for row in evaluate(config)}
    assert rows["topk_k2"]["mse"] != healthy["topk_k2"]["mse"]
    assert rows["topk_k10"]["mse"] == healthy["topk_k10"]["mse"]


@pytest.mark.parametrize(
    ("nth", "code", "said"),
    [
        (0, errno.EROFS, "error: cannot write"),
        (2, errno.ENOSPC, "error: the disk is full"),
        (4, errno.EDQUOT, "error: the disk is full"),
        (6, errno.EACCES, "error: cannot write"),
    ],
)
def test_a_disk_that_refuses_is_one_line_and_leaves_no_half_file(
    tiny, saes, tmp_path, monkeypatch, capsys, nth, code, said
):
    flushed, fsync = [], os.fsync

    def refuse(handle):
        flushed.append(handle)
        if len(flushed) > nth:
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr("thresher.shared.core.disk.os.fsync", refuse)
    assert run(tiny, saes / "topk_k2", tmp_path / "out", "--model", "false") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(said)
    assert str(tmp_path / "out") in error
    assert not list((tmp_path / "out").rglob("*.partial"))
    monkeypatch.setattr("thresher.shared.core.disk.os.fsync", fsync)
    assert run(tiny, saes / "topk_k2", tmp_path / "out", "--model", "false") == 0


def test_everything_is_refused_before_a_row_is_read(tiny, saes, tmp_path, monkeypatch, capsys, make_sae):
    def read(*arguments):
        raise AssertionError("a row was read")

    monkeypatch.setattr(ActivationStore, "read", read)
    out = tmp_path / "out"
    assert run(tiny, saes, out, "--model", tmp_path / "nowhere") == 2
    assert run(tiny, saes, out, "--probe_tasks", 2) == 2
    assert "too few held-out rows to probe" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(tiny, saes, out) == 2
    assert "make it writable" in capsys.readouterr().err
    assert not out.exists()


def test_an_output_that_holds_something_else_is_refused_and_stays_as_it_is(tiny, saes, tmp_path, capsys):
    (saes / "checkpoint.json").write_text("{}")
    for folder in (saes, saes / "topk_k2"):
        (folder / "config.toml").write_text("of the run")
    for output, reason in (
        (tiny.store / "new", "is in the store"),
        (tiny.store, "is in the store"),
        (saes / "topk_k2", "is the folder of an SAE"),
        (saes, "is the folder of a training run"),
        ("s3://bucket/evaluation", "got the URL"),
    ):
        assert run(tiny, saes, output) == 2
        assert reason in capsys.readouterr().err
    assert (saes / "config.toml").read_text() == (saes / "topk_k2/config.toml").read_text() == "of the run"
    assert not list(tiny.store.glob("new")) + list(saes.glob("*.html"))


def test_an_sae_whose_weights_are_gone_costs_the_others_nothing(tiny, saes, healthy, tmp_path, capsys):
    (saes / "topk_k2" / "sae_weights.safetensors").unlink()
    assert run(tiny, saes, tmp_path / "out", "--model", "false") == 3
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert "no SAE at" in rows["topk_k2"]["error"]
    assert rows["topk_k10"]["explained_variance"] == healthy["topk_k10"]["explained_variance"]


def test_no_sae_to_evaluate_is_refused_as_such():
    with pytest.raises(
        ThresherError, match=r"saes: expected text or a list \(at least one item, each text\), got \[\]"
    ):
        EvaluateConfig(store="store", saes=[], output="out")


def test_a_tokenizer_that_is_gone_is_refused_before_a_row_is_read(tiny, saes, tmp_path, monkeypatch, capsys):
    def gone(*arguments):
        raise ThresherError("gone")

    monkeypatch.setattr("thresher.evaluate.prepare.open_tokenizer", gone)
    monkeypatch.setattr(ActivationStore, "read", lambda *_: pytest.fail("a row was read"))
    assert run(tiny, saes, tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: gone (docs/troubleshooting.md#threshererror)\n"


def test_names_that_are_one_file_and_names_that_are_no_text(tiny, make_sae, tmp_path):
    names = [b"run_1/sae", b"run/1_sae", b"run/caf\xe9", b"run/caf\\xe9", b"other/sae"]
    for number, name in enumerate(names, 1):
        make_sae(k=number).save(tmp_path / str(number))
        (tmp_path / os.fsdecode(name)).parent.mkdir(exist_ok=True)
        (tmp_path / str(number)).rename(tmp_path / os.fsdecode(name))
    config = EvaluateConfig(
        store=str(tiny.store),
        saes=[str(tmp_path / "run_1"), str(tmp_path / "run"), str(tmp_path / "other")],
        output=str(tmp_path / "out"),
        feature_rows=200,
        bootstrap_samples=0,
        export=["neuronpedia"],
    )
    rows = evaluate(config)
    named = {"run_1/sae": 1, "run/1_sae": 2, r"run/caf\\xe9": 4, "other/sae": 5, r"run/caf\xe9": 3}
    assert {row["name"]: row["k"] for row in rows} == named
    assert {row["name"] for row in json.loads((tmp_path / "out" / "metrics.json").read_text())} == set(named)
    for kind in ("latents", "features", "neuronpedia"):
        assert len(list((tmp_path / "out" / kind).iterdir())) == 5
    fired = {sum(pq.read_table(path)["firings"].to_pylist()) for path in (tmp_path / "out" / "latents").iterdir()}
    assert fired == {k * tiny.usable.sum() for k in named.values()}


def test_a_log_that_was_cut_off_is_read_as_far_as_it_goes(tiny, saes, tmp_path):
    log = saes / "topk_k2" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 3, "los')
    (saes / "topk_k10" / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert run(tiny, saes, tmp_path / "out", "--model", "false", "--feature_rows", 0) == 0
    assert '"topk_k2":{"step":[1,2]' in (tmp_path / "out" / "report.html").read_text()


def test_what_cannot_be_read_is_refused_where_it_is_the_only_one(tiny, saes, tmp_path, capsys):
    change_weights(saes / "topk_k2", "W_enc", lambda weight: weight[3, 1].fill_(float("nan")))
    assert run(tiny, saes / "topk_k2", tmp_path / "out") == 2
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert torch.isfinite(Sae.load(saes / "topk_k10").W_enc).all()
