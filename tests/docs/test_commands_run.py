"""The commands and Python of the documents run as they are written, in their order, in one folder (make test-long).

What is left out needs a GPU, a network, a server or a file of the reader; `test_commands.py` parses it all the same.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .documents import ROOT, Block, blocks, commands

LEFT_OUT = {
    r"^thresher (harvest|train|evaluate) .*(s3://|hf://|gpt2|gemma|qwen|synth)": "a model or store elsewhere, or hours",
    r"(hf://|USER/NAME|s3://)(?!.*--dry_run)": "the Hub or an object store",
    r"\b(MODEL|SOURCE|HIDDEN_STATES)\b": "a file of the reader",
    r"--lm_eval": "lm-evaluation-harness, which tests/evaluate/causal runs",
    r"^thresher (microscope|demo)": "it serves until it is interrupted; the fixture runs the demo",
    r"^(pip|bash|torchrun|lm_eval|sbatch|sky|docker|make (?!graph$))": "an environment, or several processes",
}
PYTHON_LEFT_OUT = {
    "for activations in batches": "run by tests/test_documented_recipes.py",
    "rows_of(": "run by tests/test_documented_recipes.py",
    "urlopen": "tests/evaluate/microscope asks a server",
    'read_lm_eval(lm, "steer.csv")': "a file of the reader",
}
FIRST = ("README.md", "docs/tutorial.md")
TEXTS = {"raises.txt": "raise KeyError(x)\nraise OSError(x)\n", "returns.txt": "return x\nreturn None\n"}

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def is_run(command: list[str]) -> bool:
    return not any(re.search(pattern, " ".join(command)) for pattern in LEFT_OUT)


def to_run(command: list[str]) -> list[list[str]]:
    """Return the commands of Thresher that a command runs: itself, or the recipe of a target of make."""
    if command[0] == "thresher":
        return [command]
    recipe = re.search(rf"^{command[1]}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return [["thresher", *line.split()] for line in re.findall(r"^\t\$\(BIN\)/thresher (.*)$", recipe[1], re.MULTILINE)]


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-2000:]}"
    return done.stdout


def run_document(folder: Path, document: str) -> list[str]:
    """Run a document's commands, then its Python in one process, and return what was run."""
    thresher = str(Path(sys.executable).parent / "thresher")
    ran = []
    for block in blocks("console"):
        if block.document == document:
            for command in filter(is_run, commands(block)):
                for each in to_run(command):
                    run(folder, thresher, *each[1:])
                    ran.append(" ".join(each))
    python = [block for block in blocks("python") if block.document == document and python_is_run(block)]
    if python:
        script = "\n".join(block.text for block in python).replace("file:///…", f"file://{folder}")
        (folder / "script.py").write_text(script)
        run(folder, sys.executable, "-P", "script.py")
    return ran + [str(block) for block in python]


def python_is_run(block: Block) -> bool:
    return not any(part in block.text for part in PYTHON_LEFT_OUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "models", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    sweep = next(block.text for block in blocks("toml") if block.document == "README.md")
    (folder / "sweep.toml").write_text(sweep)
    return folder


@pytest.fixture(scope="module")
def readme(folder):
    """What was run of the README, whose store other documents use."""
    return run_document(folder, "README.md")


def test_the_readme_runs(readme):
    assert len(readme) == 6


def test_the_tutorial_runs(folder):
    assert len(run_document(folder, "docs/tutorial.md")) == 7


@pytest.fixture(scope="module")
def demo(folder, readme):
    """The folder after `thresher demo`, whose results the other documents use."""
    run(folder, str(Path(sys.executable).parent / "thresher"), "demo")
    return folder


OTHERS = sorted(
    {block.document for block in blocks("console") if any(map(is_run, commands(block)))}
    | {block.document for block in blocks("python") if python_is_run(block)}
)


@pytest.mark.parametrize("document", [name for name in OTHERS if name not in FIRST])
def test_the_commands_of_a_document_run(document, demo):
    assert run_document(demo, document)
