"""What is built and installed: every source file, every page, the demo's configurations and its model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from safetensors import safe_open

from thresher.shared.model.loading.packages import local_model

ROOT = Path(__file__).parents[1]
FOLDERS = ("shared", "harvest", "train", "evaluate", "thresher")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Return the folder that a package of the wheel is taken from."""
    known = SETUPTOOLS["package-dir"]
    root = max((name for name in known if package == name or package.startswith(f"{name}.")), key=len)
    return ROOT / known[root] / package.removeprefix(root).strip(".").replace(".", "/")


def test_every_folder_with_code_is_a_package_of_the_wheel():
    with_code = {file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert with_code <= {folder_of(package) for package in SETUPTOOLS["packages"]}


def test_every_data_file_is_in_the_wheel():
    data = SETUPTOOLS["package-data"]
    shipped = {
        file
        for package in SETUPTOOLS["packages"]
        for pattern in [*data["*"], *data.get(package, [])]
        for file in folder_of(package).glob(pattern)
    }
    needed = [
        file
        for folder in (*FOLDERS, "configs", "models")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    ]
    assert len(needed) > 30
    assert set(needed) == shipped


def test_the_bundled_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(local_model("stdlib-lm"))
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert len(list(weights.keys())) > 10
    (tmp_path / "stdlib-lm").mkdir()
    assert local_model("stdlib-lm") == "stdlib-lm"  # the user's own folder


def test_the_demo_stops_at_a_stage_that_fails_and_keeps_a_changed_configuration(tmp_path):
    config = tmp_path / "configs/harvest/demo.toml"
    config.parent.mkdir(parents=True)
    config.write_text("tokens = 0\n")
    code = "from thresher.shared.core.cli import run; run()"
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "$ thresher harvest configs/harvest/demo.toml\n"
    assert done.stderr.count("\n") == 1
    assert "is missing" in done.stderr
    assert config.read_text() == "tokens = 0\n"
    assert list(tmp_path.rglob("*.toml")) == [config]


def test_the_version_is_defined_once_and_is_the_newest_of_the_changelog():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    released = [heading for heading in headings if heading != ("Unreleased", "")]
    assert released == headings[-len(released) :]
    assert released[0][0] == version
    assert released[0][1]
    numbers = [tuple(map(int, name.split("."))) for name, _ in released]
    assert numbers == sorted(numbers, reverse=True)
    assigned = re.compile(r"^(__version__|version|VERSION)\b.*=.*\d+\.\d+\.\d+", re.M)
    others = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if assigned.search(file.read_text())]
    assert others == []


def test_every_target_of_make_is_defined_once_and_runs_always():
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z0-9-]*):", text, flags=re.MULTILINE)
    assert len(targets) == len(set(targets))
    phony = " ".join(re.findall(r"^\.PHONY:(.*)$", text, flags=re.MULTILINE)).split()
    assert sorted(phony) == sorted(targets)
