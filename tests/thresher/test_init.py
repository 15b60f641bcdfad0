"""`thresher init`: files that run as they are, with an estimate that was measured."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import BertConfig

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.speed import EvaluationSpeed
from thresher.harvest.config import HarvestConfig
from thresher.init_command import InitConfig, completed_by
from thresher.init_estimate import RunEstimate
from thresher.shared.core import cli
from thresher.shared.core.config import load_config
from thresher.shared.store import ActivationStore
from thresher.toml_comments import commented_toml, descriptions
from thresher.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
STAGES = {"harvest": HarvestConfig, "train": TrainConfig, "evaluate": EvaluateConfig}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(400):
        (folder / f"{number}.py").write_text(f"def number_{number}(a, b):\n    return a * {number} + b\n" * 3)
    return folder


@pytest.fixture
def flags(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return [
        *("init", "--model", "stdlib-lm", "--dataset", str(text), "--tokens", "12_000", "--output", "first"),
        *("--d_sae", "128", "--context_size", "64", "--device", "cpu"),
    ]


def test_the_files_run_as_they_are_and_the_estimate_fits(flags, tmp_path, capsys):
    assert cli.main(flags) == 0
    said = capsys.readouterr().out
    stored = float(re.findall(r"disk    about \S+ \w+: ([\d.]+) MB for the store", said)[0])
    saes, unit = re.findall(r"store, ([\d.]+) (\w+) for 3 SAEs", said)[0]
    commands = [line.split() for line in said.splitlines() if line.startswith("  thresher ")]
    assert [command[1] for command in commands] == list(STAGES)
    for command in commands:
        assert cli.main([*command[1:], "--quiet"]) == 0, capsys.readouterr().err
    rows = json.loads(Path("first/evaluation/metrics.json").read_text())
    (expected,) = re.findall(r"to evaluate, with ([\d,]+) tokens in the model at", said)
    assert int(expected.replace(",", "")) == 602  # a twentieth of the rows
    assert rows[0]["n_model_tokens"] == pytest.approx(602, rel=0.5)  # whole documents, without masked rows
    assert sorted(row["k"] for row in rows) == [16, 32, 64]
    assert {row["d_sae"] for row in rows} == {128}
    store = ActivationStore.open("first/store")
    assert store.n_rows == 12_032  # whole contexts of 64
    measured = sum(file.stat().st_size for file in Path("first/store").rglob("*") if file.is_file())
    assert stored * 1e6 == pytest.approx(measured, rel=0.15)
    kept = sum(file.stat().st_size for file in Path("first/saes").rglob("*") if file.is_file())
    assert float(saes) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(kept, rel=0.15)


def test_the_seconds_are_those_of_starting_loading_and_each_part():
    harvest = HarvestConfig(
        model="m", dataset="d", hook_points=["x"], context_size=100, tokens=200_000, store="s", holdout_fraction=0.1
    )
    taken = RunEstimate(
        device="cpu",
        row_bytes=1.0,
        sae_bytes=1,
        n_saes=1,
        start_seconds=3.0,
        load_seconds=20.0,
        harvest_speed=1_000.0,
        train_speed=500.0,
        evaluation=EvaluationSpeed(offline=0.001, model=0.01, features=0.0001, effects=5.0),
        harvest_memory=1,
        train_memory=1,
        trial_seconds=1.0,
    )
    evaluate = EvaluateConfig(store="s", saes="a", output="o")
    evaluating = 23 + 20_000 * 0.001 + 20_000 * 0.01 + 200_000 * 0.0001 + 5
    assert taken.seconds(harvest, evaluate) == pytest.approx((23 + 200, 3 + 360, evaluating))
    (time,) = [line for line in taken.lines(harvest, evaluate) if line.startswith("time")]
    assert time == (
        "time    about 14.2 min: 3.7 min to harvest at 1,000 tokens/s, 6.0 min to train at 500 tokens/s, "
        "4.5 min to evaluate, with 20,000 tokens in the model at 100 tokens/s"
    )


def test_a_model_that_predicts_no_next_token_is_left_out_of_the_evaluation(flags, tmp_path):
    BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path / "bert")
    flags[flags.index("stdlib-lm")] = str(tmp_path / "bert")
    assert cli.main([*flags, "--measure", "false"]) == 0
    assert load_config(EvaluateConfig, tmp_path / "first/evaluate.toml", []).model is False
    flags[flags.index(str(tmp_path / "bert"))], flags[flags.index("first")] = "stdlib-lm", "second"
    assert cli.main([*flags, "--measure", "false"]) == 0
    assert load_config(EvaluateConfig, tmp_path / "second/evaluate.toml", []).model is None


def test_the_trial_needs_no_held_out_text(flags, text, tmp_path, monkeypatch, capsys):
    """Its text is the beginning, here one long document; the documents after it are enough for the run."""
    for file in text.iterdir():
        file.write_text(f"total = total + {file.stem}\n" * 400)
    monkeypatch.setattr("thresher.init_estimate._MOST_BYTES", 1)  # one batch
    flags[flags.index("12_000")] = "200_000"
    assert cli.main(flags) == 0, capsys.readouterr().err
    assert load_config(HarvestConfig, tmp_path / "first/harvest.toml", []).holdout_fraction == 0.05


def test_the_files_say_what_they_hold(flags, tmp_path):
    assert cli.main([*flags, "--hook_points", "blocks.0.resid_post,blocks.1.mlp_out", "--quiet"]) == 0
    for stage, cls in STAGES.items():
        path = tmp_path / "first" / f"{stage}.toml"
        config = load_config(cls, path, [])
        assert config.device == "cpu"
        lines = path.read_text().splitlines()
        uncommented = [re.sub(r"^# (\w+ = )", r"\1", line) for line in lines]
        everything = tomllib.loads("\n".join(uncommented))
        assert len(everything) > len(tomllib.loads(path.read_text()))
        for key in tomllib.loads("\n".join(uncommented)):
            assert any(line.startswith("# ") and descriptions(cls)[key][:60] in line for line in lines), key
    harvest = load_config(HarvestConfig, tmp_path / "first/harvest.toml", [])
    assert harvest.hook_points == ["blocks.0.resid_post", "blocks.1.mlp_out"]
    assert harvest.tokens == 12_000
    assert len(load_config(TrainConfig, tmp_path / "first/train.toml", []).sae) == 2
    heading = (tmp_path / "first/harvest.toml").read_text().split("\n\n")[0]
    for word in ("# disk    about", "# time    about", "# memory  about"):
        assert word in heading


def test_nothing_is_overwritten_and_nothing_half_written(flags, tmp_path, capsys):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/train.toml").write_text("mine")
    assert cli.main(flags) == 2
    assert capsys.readouterr().err == (
        "error: first/train.toml exists already; choose another output, or remove it first\n"
    )
    assert [file.name for file in (tmp_path / "first").iterdir()] == ["train.toml"]
    assert cli.main([*flags[:-2], "--device", "cpu", "--output", "second", "--hook_points", "blocks.9.resid_post"]) == 2
    assert "blocks.9.resid_post" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_a_store_that_does_not_fit_is_refused(flags, tmp_path, capsys):
    flags[flags.index("12_000")] = str(10**14)
    assert cli.main([*flags, "--measure", "false"]) == 2
    assert "make room, lower tokens" in capsys.readouterr().err
    assert not (tmp_path / "first").exists()


def test_without_measuring_the_disk_alone_is_estimated(flags, tmp_path, capsys):
    assert cli.main([*flags, "--measure", "false"]) == 0
    said = capsys.readouterr().out
    assert "time    not measured" in said
    assert load_config(HarvestConfig, tmp_path / "first/harvest.toml", []).hook_points == ["blocks.2.resid_post"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": None}, "'dataset' is missing"),
        ({"model": "synthetic:synth-1k"}, "is for language models"),
        ({"model": "no/such/model"}, "no model 'no/such/model'"),
        ({"tokens": "many"}, "--tokens: expected an integer"),
    ],
)
def test_mistakes_without_a_terminal(changes, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"model": "stdlib-lm", "dataset": "python-stdlib", "tokens": "1000", "output": "first"} | changes
    assert cli.main(["init", *[f"--{key}={value}" for key, value in given.items() if value is not None]]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_questions_are_asked_of_what_is_missing():
    asked = []

    def ask(question):
        asked.append(question)
        return {"Budget": "2_000", "Folder": ""}.get(question.split()[0].strip(":"), " ")

    values = completed_by(ask, {"model": "m", "dataset": "d"})
    assert values == {"model": "m", "dataset": "d", "tokens": 2000, "output": "runs/first"}
    assert [question.split()[0] for question in asked] == ["Budget:", "Folder"]


def test_a_terminal_is_asked(tmp_path, text):
    ours, theirs = pty.openpty()
    code = "from thresher.shared.core.cli import run; run()"
    command = [sys.executable, "-P", "-c", code, "init", "--dataset", str(text), "--measure", "false"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path)
    os.close(theirs)
    os.write(ours, b"\n5000\nmine\n")
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert child.wait() == 0, said
    os.close(ours)
    assert b"Model: a folder or a Hugging Face id [stdlib-lm]: " in said
    harvest = load_config(HarvestConfig, tmp_path / "mine/harvest.toml", [])
    assert (harvest.model, harvest.tokens, harvest.store) == ("stdlib-lm", 5000, "mine/store")


def test_values_of_every_kind_survive():
    config = InitConfig(model='a"b\\c', dataset="ü", tokens=3_000_000, output="o", hook_points=["x", "y"])
    values = {key: getattr(config, key) for key in ("model", "dataset", "tokens", "output", "hook_points")}
    written = commented_toml(InitConfig, ["A heading."], values, config, ("context_size", "measure"))
    assert tomllib.loads(written) == values
    assert "tokens = 3_000_000" in written
