"""The command line as a user meets it: help is quick, mistakes cost one line and exit code 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from thresher.shared.core.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from thresher.shared.core.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True)


def test_help_lists_every_command_and_imports_no_torch():
    code = "import sys; from thresher.shared.core.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("harvest", "train", "evaluate", "explain", "store"):
        assert f"  {command}" in done.stdout
    order = [done.stdout.index(f"  {stage} ") for stage in ("harvest", "train", "evaluate")]
    assert order == sorted(order)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None  # importing them fails
from thresher.shared.core.cli import commands, main
for command in commands():
    if command != "train":
        assert main([command, "--help"]) == 0, command
try:
    main(["train", "--help"])
except ImportError:
    sys.stdout.flush()
"""


def test_help_of_every_command_needs_no_torch_and_that_of_training_only_for_its_architectures():
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("evaluate", "explain", "graph", "harvest", "hooks", "init", "microscope", "steer", "train"):
        assert f"usage: thresher {command}" in done.stdout
    of_training = done.stdout.partition("usage: thresher train")[2]
    assert "--batch_size" in of_training  # the run's keys come first, at once
    assert "architectures, with the keys" not in of_training


@pytest.mark.parametrize("stage", ["harvest", "train", "evaluate"])
def test_stage_help_names_every_key(stage, capsys):
    assert main([stage, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: thresher {stage}" in shown
    assert "--store" in shown
    assert " (required)" in shown


def test_help_may_be_cut_off():
    code = "from thresher.shared.core.cli import run; run()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-P", "-c", code, "train", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("given", ["harvest", "train", "evaluate"])
@pytest.mark.parametrize("stage", ["harvest", "train", "evaluate"])
def test_a_config_file_of_another_stage_is_recognised(stage, given, capsys):
    path = str(Path(__file__).parents[1] / "configs" / given / "gpt2-small.toml")
    if stage == given:
        return
    assert main([stage, path]) == 2
    assert f"'{path}' is a config file of `thresher {given}`, not of `thresher {stage}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["harvst"], "no command 'harvst'"),
        (["train", "no/such.toml"], "no config file at 'no/such.toml'"),
        (["harvest", "--modl", "x"], "unknown key 'modl'; did you mean 'model'?"),
        (["evaluate", "--store"], "--store needs a value"),
        (["train", "--store", "x"], "command line: 'output' is missing"),
        (["store", "verify", "no/such/store"], "no/such/store"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    from thresher.shared.core.cli import run_guarded

    with pytest.raises(ZeroDivisionError):
        run_guarded(lambda: 1 / 0)


def test_train_help_lists_the_keys_of_every_table_and_every_architecture(capsys):
    from thresher.train.architectures import ARCHITECTURES
    from thresher.train.config import SaeConfig, TrainConfig

    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    run_keys, rest = shown.split("keys of every [[sae]] table")
    sae_keys, architectures = rest.split("architectures, with the keys that they need")
    assert {line.split()[0] for line in run_keys.splitlines() if line.startswith("  --")} == {
        f"--{key}" for key in TrainConfig.__struct_fields__
    }
    listed = [line.split()[0] for line in sae_keys.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(set(SaeConfig.__struct_fields__) - set(SaeConfig.unused))
    lines = {line.split()[0]: line for line in architectures.splitlines() if line.startswith("  ")}
    assert lines.keys() == ARCHITECTURES.keys()
    assert lines["topk"].endswith("(arXiv 2406.04093). Needs k.")


@pytest.mark.parametrize("arguments", [["train", "--help", "jumprelu"], ["train", "jumprelu", "-h"]])
def test_train_help_on_an_architecture_lists_its_own_keys(arguments, capsys):
    assert main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert all(line.endswith("(optional)") for line in lines)
    keys = [line.split()[0] for line in lines]
    assert {"l0_coefficient", "target_l0", "tanh_scale", "sparsity_warmup_steps"} < set(keys)
    assert not {"k", "lr", "hook_point", "architecture"} & set(keys)
    assert main(["train", "--help", "jumpreul"]) == 2
    assert capsys.readouterr().err == "error: no architecture 'jumpreul'; did you mean 'jumprelu'?\n"


def test_train_help_on_an_architecture_begins_with_the_keys_that_it_needs(capsys):
    assert main(["train", "--help", "topk"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines[0].split()[0] == "k"
    assert lines[0].endswith("(required)")
    assert not any(line.endswith("(required)") for line in lines[1:])


def test_help_with_a_config_file_is_the_stages(capsys):
    assert main(["train", "some.toml", "--help"]) == 0
    assert "usage: thresher train" in capsys.readouterr().out
