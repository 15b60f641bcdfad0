"""Every command in the documents is parsed by the parser that would run it: programs, keys, values and files exist.

Those that need no GPU, network or files of the reader are run as they are by `test_commands_run.py`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

from thresher.shared.core.cli import main
from thresher.shared.core.config import load_config
from thresher.shared.core.terminal.logs import take_log_flags
from thresher.train.sweep.grids import expand_sweep

from .documents import ROOT, Block, blocks, commands

FOUND = [(block, command) for block in blocks("console") for command in commands(block)]
ENTRIES = {entry.name: entry for entry in entry_points(group="thresher.commands")}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
README_SWEEP = next(block.text for block in blocks("toml") if block.document == "README.md")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with what a checkout has, and the reader's file that the README shows, without a network."""
    for name in ("configs", "models", "tools", "examples", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "sweep.toml").write_text(README_SWEEP)
    monkeypatch.chdir(tmp_path)
    started = SimpleNamespace(microscope=lambda config: 0)
    monkeypatch.setitem(sys.modules, "thresher.evaluate.microscope.run", started)  # it would serve
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def is_accepted(command: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    """Return whether `thresher` takes the command's keys and values; files may be missing."""
    if command[1:] == ["--version"]:
        return main(command[1:]) == 0
    _, command = take_log_flags(command)
    name, arguments = command[1], [argument.replace("s3://", "./no-such-") for argument in command[2:]]
    assert name in ENTRIES, command
    config = getattr(ENTRIES[name].load(), "CONFIG", None)
    if config is not None:
        loaded = load_config(config, None, arguments)
        if name == "train":
            expand_sweep(loaded.sae)
        return True
    if name == "demo":
        return arguments == []
    code = main([name, *arguments])
    return code == 0 or "docs/troubleshooting.md#" in capsys.readouterr().err  # not a ConfigError


@pytest.mark.parametrize(("block", "command"), FOUND, ids=[" ".join(command)[:60] for _, command in FOUND])
def test_a_command_is_one_that_its_program_takes(block: Block, command: list[str], folder, capsys):
    program, *arguments = command
    if program == "thresher":
        assert is_accepted(command, capsys)
    elif program == "torchrun":
        stage = arguments.index("-m") + 1
        assert arguments[stage].startswith("thresher.")
        assert is_accepted(["thresher", arguments[stage].removeprefix("thresher."), *arguments[stage + 1 :]], capsys)
    elif program == "make":
        assert [argument for argument in arguments if "=" not in argument and argument not in TARGETS] == []
    elif program == "pip":
        extras = re.findall(r"\[(.*)\]", arguments[-1])
        assert {name for listed in extras for name in listed.split(",")} <= EXTRAS.keys()
    elif program in ("bash", "sbatch"):
        assert (folder / arguments[0]).is_file()
    elif program == "sky":
        assert (folder / arguments[-1]).is_file()
    elif program == "docker":
        assert (ROOT / "Dockerfile").is_file()
        assert arguments[0] == "build" or is_accepted(arguments[arguments.index("thresher") :], capsys)
    else:
        assert program == "lm_eval"  # run by tests/evaluate/causal


def test_the_check_refuses_what_a_parser_refuses(capsys):
    assert is_accepted(["thresher", "store", "verify", "no-such"], capsys)
    for name in ("store", "sae", "hooks", "microscope"):
        wrong = ["thresher", name, *({"store": ["verify"], "sae": ["info"]}.get(name, [])), "x", "--no_such_key", "y"]
        assert not is_accepted(wrong, capsys), name
    assert not is_accepted(["thresher", "store", "push", "x"], capsys)
    with pytest.raises(ValueError, match="unknown key"):
        is_accepted(["thresher", "harvest", "configs/harvest/demo.toml", "--modle", "x"], capsys)
    tables = '[{hook_point = "a", d_sae = 8, kk = 2}]'
    with pytest.raises(ValueError, match="unknown key 'kk'"):
        is_accepted(["thresher", "train", "--store", "x", "--output", "y", "--sae", tables], capsys)
    with pytest.raises(FileNotFoundError):
        is_accepted(["thresher", "harvest", "configs/harvest/no-such.toml"], capsys)


def test_blocks_without_a_language_show_no_commands():
    assert [str(block) for block in blocks("") if re.search(r"^(\$ )?(thresher|make|pip) ", block.text, re.M)] == []
    assert len(FOUND) > 60
