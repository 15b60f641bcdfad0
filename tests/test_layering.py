"""The direction of imports: the stages import `shared`, never each other; `shared` imports none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("harvest", "train", "evaluate")


def imported_packages(file: Path) -> set[str]:
    """Return the Thresher packages that a file imports, relative or absolute."""
    package = file.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level:
                above = package[: len(package) - node.level + 1]
                names = [*above, *module] if node.module else [*above, node.names[0].name]
                if names:
                    found.add(names[0])
            elif module[0] == "thresher" and len(module) > 1:
                found.add(module[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("thresher.")}
    return found


@pytest.mark.parametrize("package", ["shared", *STAGES])
def test_layers(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    allowed = {"shared", package}
    for file in files:
        strangers = imported_packages(file) & {"shared", *STAGES} - allowed
        assert not strangers, f"{file.relative_to(ROOT)} imports {sorted(strangers)}"


def test_the_check_sees_relative_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "train" / "deep").mkdir(parents=True)
    file = tmp_path / "train" / "deep" / "a.py"
    file.write_text("from ...harvest.run import harvest\nfrom ..x import y\nimport thresher.evaluate.run\n")
    assert imported_packages(file) == {"harvest", "train", "evaluate"}


def test_no_file_is_a_house_with_too_few_rooms():
    files = [
        p for folder in ("shared", *STAGES, "models", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 500}
    assert not long
