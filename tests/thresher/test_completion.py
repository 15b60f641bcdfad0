"""What a shell is told while one types: commands, keys, choices and hook points, without PyTorch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open

from thresher.completion_command import SHELLS, parser_for
from thresher.harvest.config import HarvestConfig
from thresher.shared.core import cli
from thresher.shared.core.terminal.logs import LogSettings
from thresher.shared.model.config_file import likely_hook_points
from thresher.shared.model.hook_points import KINDS

ROOT = Path(__file__).parents[2]
RUN = "from thresher.shared.core.cli import run; run()"
COMMON = [f"--{key}" for key in LogSettings.__struct_fields__]


@pytest.fixture
def answers(tmp_path):
    """The function that returns what the shell is told at the end of a line, in the order told."""

    def ask(line: str, **environment: str) -> list[str]:
        out = tmp_path / "out"
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n"}
        asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
        done = subprocess.run(
            [sys.executable, "-P", "-X", "importtime", "-c", RUN],
            env=os.environ | asked | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert "msgspec" in imported
        assert not imported & {"torch", "transformers", "numpy", "huggingface_hub", "datasets"}
        return [word.strip() for word in out.read_text().split("\n")]

    return ask


def test_commands(answers):
    assert [word for word in answers("thresher ") if not word.startswith("-")] == list(cli.commands())
    assert answers("thresher har") == ["harvest"]


def test_keys_of_a_command_and_those_of_all(answers):
    keys = [f"--{key}" for key in HarvestConfig.__struct_fields__]
    assert sorted(answers("thresher harvest --")) == sorted([*keys, *COMMON])
    assert answers("thresher harvest a.toml --hook") == ["--hook_points"]


def test_choices_and_flags(answers):
    assert answers("thresher harvest --codec ") == ["int8", "lz4", "none", "zstd"]
    assert answers("thresher train --dry_run t") == ["true"]
    assert answers("thresher train --log_format ") == ["json", "text"]


def test_actions_and_their_keys(answers):
    assert answers("thresher store s") == ["sample"]
    assert sorted(answers("thresher store sample x --")) == sorted(["--contexts", "--seed", "--tokenizer", *COMMON])
    assert answers("thresher sae convert x y --f") == ["--format"]


def test_hook_points_of_a_model_and_of_a_config_file(answers):
    line = "thresher harvest --model stdlib-lm --hook_points blocks.3.resid_post,blocks.1.mlp_i"
    assert answers(line) == [f"blocks.3.resid_post,blocks.1.{kind}" for kind in ("mlp_in_normalized", "mlp_in")]
    found = answers("thresher harvest configs/harvest/demo.toml --hook_points blocks.2.resid_")
    assert found == [f"blocks.2.resid_{kind}" for kind in ("pre", "mid", "post")]


def test_models_are_the_bundled_one_those_in_the_cache_and_folders(answers, tmp_path):
    config = tmp_path / "hub/models--openai--gpt2/snapshots/1/config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"n_layer": 12}))
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert answers("thresher hooks std", **cache) == ["stdlib-lm"]
    assert "openai/gpt2" in answers("thresher hooks ", **cache)
    assert answers("thresher hooks models/stdl", **cache) == ["models/stdlib-lm/"]
    line = "thresher harvest --model openai/gpt2 --hook_points blocks.11.attn"
    assert answers(line, **cache) == ["blocks.11.attn_out", "blocks.11.attn_z"]


@pytest.mark.parametrize(
    ("config", "n_blocks"),
    [
        ({"num_hidden_layers": 3}, 3),
        ({"text_config": {"num_hidden_layers": 2}}, 2),
        ({"n_layers": 1}, 1),
        ({"model_type": "odd"}, 0),
        ([], 0),
    ],
)
def test_hook_points_follow_the_number_of_blocks(tmp_path, config, n_blocks):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert likely_hook_points(str(tmp_path)) == [f"blocks.{n}.{kind}" for n in range(n_blocks) for kind in KINDS]
    assert likely_hook_points(str(tmp_path / "no/such")) == []


def test_the_bundled_model_has_as_many_blocks_as_its_weights():
    with safe_open(ROOT / "models/stdlib-lm/model.safetensors", "pt") as weights:
        names = list(weights.keys())
    blocks = {block for name in names for block in re.findall(r"\bh\.(\d+)\.", name)}
    assert len(likely_hook_points("stdlib-lm")) == len(blocks) * len(KINDS)


def test_every_command_has_a_parser():
    for name, entry in cli.commands().items():
        module = entry.load()
        actions = module.actions() if hasattr(module, "actions") else {"": getattr(module, "CONFIG", None)}
        for action, config in actions.items():
            known = {option.dest for option in parser_for([name, action] if action else [name])._actions}
            fields = config.__struct_fields__ if config is not None and issubclass(config, msgspec.Struct) else ()
            assert known >= {*fields, *LogSettings.__struct_fields__}


def test_bash_completes_with_the_script(tmp_path):
    command = tmp_path / "thresher"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "{RUN}" "$@"\n')
    command.chmod(0o755)
    line = "thresher harvest --co"
    script = (
        f'eval "$(thresher completion bash)"; COMP_LINE="{line}"; COMP_POINT={len(line)}; COMP_TYPE=9\n'
        '_python_argcomplete thresher; printf "%s\\n" "${COMPREPLY[@]}"; complete -p thresher'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.stderr == ""
    *found, registered = done.stdout.splitlines()
    assert [word.strip() for word in found] == ["--context_size", "--codec", "--codec_level"]
    assert registered.endswith("thresher")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_are_ones_that_the_shell_can_read(shell, capsys, tmp_path):
    assert cli.main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "thresher" in script.read_text()
    if shutil.which(shell):
        done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_another_shell_is_refused_and_a_missing_package_named(capsys, monkeypatch):
    assert cli.main(["completion", "tcsh"]) == 2
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err
    monkeypatch.setattr("thresher.completion_command.find_spec", lambda name: None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'thresher[completion]'" in capsys.readouterr().err
