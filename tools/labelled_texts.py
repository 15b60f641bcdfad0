"""Write labelled texts for k-sparse probing, from packages alone: `thresher evaluate --probe_texts FILE`.

    .venv/bin/python tools/labelled_texts.py [--output runs/text/labelled]

- `sentiment.jsonl`: reviews, editorials and tweets that people rated, `positive` or `negative`;
- `source.jsonl`: the same texts, labelled by where they are from;
- `python.jsonl`: docstrings, comments and code of installed packages, labelled by tokenising them;
- `package.jsonl`: code of installed packages, labelled by its package.

The rated texts are those of VADER (Hutto and Gilbert, ICWSM 2014; MIT), in the source distribution of vaderSentiment,
which pip downloads. A text is positive from a mean rating of 1 on and negative from -1 on, of -4 to 4.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

VADER = "vaderSentiment==3.3.2"
RATED = {
    "movieReviewSnippets": "movie review",
    "amazonReviewSnippets": "product review",
    "nytEditorialSnippets": "editorial",
    "tweets": "tweet",
}
PACKAGES = ("torch", "numpy", "transformers", "pyarrow", "scipy", "jinja2", "tqdm", "safetensors")
FILES_PER_PACKAGE, TEXTS_PER_LABEL, LEAST_WORDS, CODE_LINES = 60, 1200, 4, 6
Labelled = tuple[str, str]


def rated_texts() -> Iterator[tuple[str, float, str]]:
    """Yield each rated text with its mean rating and where it is from."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-binary", "vaderSentiment", "--dest", folder, VADER], check=True)
        (path,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(path) as whole:
            inner = next(member for member in whole if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
            content = whole.extractfile(inner)
            assert content is not None
            with tarfile.open(fileobj=io.BytesIO(content.read())) as archive:
                for name, source in RATED.items():
                    file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                    assert file is not None
                    for line in file.read().decode("utf-8", "replace").splitlines():
                        _, rating, text = line.split("\t", 2)
                        yield text.strip(), float(rating), source


def sources_of(package: str) -> Iterator[str]:
    """Yield the source of some modules of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    for path in files[:: max(1, len(files) // FILES_PER_PACKAGE)]:
        yield path.read_text("utf-8", errors="replace")


def parts_of(source: str) -> Iterator[Labelled]:
    """Yield a module's docstrings, comments, and stretches of code without either, each with its label."""
    try:
        tree, tokens = ast.parse(source), list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    yield from ((text, "docstring") for node in documented if (text := ast.get_docstring(node)))
    other = set()
    for token in tokens:
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("#! "), "comment"
            other.add(token.start[0])
    for node in documented:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
            other.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = source.splitlines()
    for start in range(0, len(lines), CODE_LINES):
        numbers = range(start + 1, min(start + CODE_LINES, len(lines)) + 1)
        yield "\n".join(lines[n - 1] for n in numbers if n not in other), "code"


def write(path: Path, texts: Iterable[Labelled]) -> None:
    """Write as many texts of each label as there are of the rarest, at most `TEXTS_PER_LABEL`, in a random order."""
    by_label: dict[str, list[str]] = {}
    for text, label in dict.fromkeys(texts):
        if len(text.split()) >= LEAST_WORDS:
            by_label.setdefault(label, []).append(text)
    rng = np.random.default_rng(0)
    n = min(TEXTS_PER_LABEL, *map(len, by_label.values()))
    rows = [(some[i], label) for label, some in by_label.items() for i in rng.choice(len(some), n, replace=False)]
    lines = [json.dumps({"text": rows[i][0], "label": rows[i][1]}) for i in rng.permutation(len(rows))]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(lines):,} texts, {n:,} of each of {', '.join(by_label)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/text/labelled"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    rated = list(rated_texts())
    signs = {1: "positive", -1: "negative"}
    write(output / "sentiment.jsonl", ((text, signs[int(np.sign(r))]) for text, r, _ in rated if abs(r) >= 1))
    write(output / "source.jsonl", ((text, source) for text, _, source in rated))
    parts = {package: [part for source in sources_of(package) for part in parts_of(source)] for package in PACKAGES}
    write(output / "python.jsonl", (part for some in parts.values() for part in some))
    code = ((text, package) for package, some in parts.items() for text, label in some if label == "code")
    write(output / "package.jsonl", code)


if __name__ == "__main__":
    main()
