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
    for command in ("harvest", "train", "evaluate", "store"):
        assert f"  {command}" in done.stdout
    order = [done.stdout.index(f"  {stage} ") for stage in ("harvest", "train", "evaluate")]
    assert order == sorted(order)


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
