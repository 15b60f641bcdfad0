"""The blocks of code in the documents, and the commands in those that show a terminal."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
_PROGRAMS = ("thresher", "make", "torchrun", "pip", "bash", "lm_eval", "docker", "sbatch", "sky")


class Block(NamedTuple):
    """A block of code: the document it is from, its number there, its language and its text."""

    document: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}, block {self.number}"


def blocks(language: str) -> list[Block]:
    """Return the blocks of a language, in the order of the documents."""
    found = []
    for document in DOCUMENTS:
        name = document.relative_to(ROOT).as_posix()
        fences = re.finditer(r"^```(\w*)\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [Block(name, number, fence[1], fence[2]) for number, fence in enumerate(fences, 1)]
    return [block for block in found if block.language == language]


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a block as bash divides them into words: programs print their arguments instead."""
    record = "".join(f"{name}() {{ printf '%s\\0' {name} \"$@\"; printf '\\n\\0'; }}\n" for name in _PROGRAMS)
    done = subprocess.run(
        ["bash", "-euc", record + block.text], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 0, f"{block}: {done.stderr}"
    assert done.stderr == "", f"{block}: {done.stderr}"
    return [command.strip("\0").split("\0") for command in done.stdout.split("\n\0") if command]
