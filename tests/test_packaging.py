"""What an installation contains: every folder of the source is a package of it, with the files that are not Python."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("evaluate", "harvest", "shared", "train")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_is_installed():
    folders = {file.parent.relative_to(ROOT) for stage in STAGES for file in (ROOT / stage).rglob("*.py")}
    assert len(folders) > 40
    expected = {"thresher"} | {".".join(("thresher", *folder.parts)) for folder in folders}
    assert set(SETUPTOOLS["packages"]) == expected
    assert SETUPTOOLS["package-dir"] == {"thresher": "thresher"} | {f"thresher.{stage}": stage for stage in STAGES}


def test_every_file_is_installed():
    files = [file for stage in STAGES for file in (ROOT / stage).rglob("*") if file.is_file()]
    others = [file for file in files if file.suffix not in (".py", ".pyc")]
    assert len(others) > 20
    left_out = []
    for file in others:
        package = ".".join(("thresher", *file.parent.relative_to(ROOT).parts))
        patterns = [*SETUPTOOLS["package-data"]["*"], *SETUPTOOLS["package-data"].get(package, [])]
        if not any(file.match(pattern) for pattern in patterns):
            left_out.append(str(file.relative_to(ROOT)))
    assert left_out == []
