"""The page on errors has a section for each class, which the printed line names, and quotes messages that exist."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

from thresher.shared.core.cli import main, run_guarded
from thresher.shared.core.errors import ConfigError, HookPointError, OutputError, StoreBusyError, ThresherError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
SOURCES = [file for folder in ("shared", "harvest", "train", "evaluate") for file in (ROOT / folder).rglob("*.py")]


def classes() -> dict[str, set[str]]:
    """Return the names of all classes of errors and of their bases, as the sources define them."""
    found = {}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    errors = {"ThresherError"}
    while new := {name for name, bases in found.items() if bases & errors} - errors:
        errors |= new
    return {name: found[name] for name in errors}


def test_every_class_has_a_section_and_every_section_a_class():
    sections = re.findall(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(sections) == sorted(name for name in classes() if name[0] != "_")


def test_every_class_names_its_section_or_its_base_class_does():
    pages = ThresherError.__subclasses__()
    while pages:
        cls = pages.pop()
        pages += cls.__subclasses__()
        public = cls.__name__ if cls.__name__[0] != "_" else cls.__base__.__name__
        assert cls.anchor() == public.lower()


def test_every_quoted_message_is_in_the_sources():
    constants = {
        node.value
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    rows = re.findall(r"^\| `([^`]*)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(rows) > 20
    missing = [
        (row, part)
        for row in rows
        for part in row.split("…")
        if len(part.strip(" ':;()?,.")) > 3 and not any(part.strip() in text for text in constants)
    ]
    assert missing == []
    assert all(max(map(len, row.split("…"))) > 8 for row in rows)


def test_the_line_names_the_section(capsys):
    def busy():
        raise StoreBusyError("another process is writing;\n wait")

    assert run_guarded(busy) == 2
    assert capsys.readouterr().err == (
        "error: another process is writing; wait (docs/troubleshooting.md#storebusyerror)\n"
    )
    assert main(["store", "info", "no/such/store"]) == 2
    printed = capsys.readouterr().err
    assert printed.endswith("(docs/troubleshooting.md#missingfileerror)\n")
    assert main(["train", "--sotre", "x"]) == 2
    assert "troubleshooting" not in capsys.readouterr().err  # the message says all


def test_a_traceback_names_the_section_and_the_message_does_not():
    error = HookPointError("no hook point 'x'")
    assert str(error) == "no hook point 'x'"
    assert error.__notes__ == ["see docs/troubleshooting.md#hookpointerror"]
    assert not hasattr(ConfigError("x"), "__notes__")
    copied = pickle.loads(pickle.dumps(OutputError("full")))
    assert (str(copied), copied.__notes__) == ("full", ["see docs/troubleshooting.md#outputerror"])
