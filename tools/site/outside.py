"""Files outside of docs that documents link to, as pages, so that links work in the site as in the repository."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LINK = re.compile(r'(?P<before>\]\(|(?:src|href)=")(?P<target>[^)\s"]+)')
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".sh": "bash", ".js": "javascript"}


def site_path(path: Path, root: Path) -> str:
    """Return where in the site's sources a file or folder of the repository is."""
    relative = path.relative_to(root)
    if relative.as_posix() in ("README.md", "docs"):
        return "index.md"
    if relative.parts[0] == "docs":
        inside = relative.relative_to("docs")
        return (inside / "README.md" if path.is_dir() else inside).as_posix()
    shown = relative / "index.md" if path.is_dir() else relative
    return f"repository/{shown.as_posix()}" + ("" if shown.suffix == ".md" else ".md")


def linked_files(document: Path) -> Iterator[Path]:
    """Yield the files and folders that a document links to."""
    for match in _LINK.finditer(_CODE.sub("", document.read_text())):
        path = match["target"].partition("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            yield Path(os.path.normpath(document.parent / path))


def outside_pages(root: Path) -> dict[str, str]:
    """Return the text of a page for every file outside of docs that is linked, directly or from such a page."""
    rest = [root / "README.md", *(root / "docs").rglob("*.md")]
    seen = set(rest)
    pages = {}
    while rest:
        path = rest.pop()
        inside = path.is_relative_to(root / "docs") or path == root / "README.md"
        if not inside:
            pages[site_path(path, root)] = _page(path, root)
        found = (
            linked_files(path)
            if path.suffix in (".md", ".ipynb")
            else _listed(path)
            if path.is_dir() and not inside
            else ()
        )
        new = {each for each in found if each.exists()} - seen
        seen |= new
        rest += new
    return pages


def with_site_links(markdown: str, source: Path, page: str, root: Path) -> str:
    """Return a document's text with links from its place in the site, `page`."""

    def replaced(match: re.Match[str]) -> str:
        path, anchor, rest = match["target"].partition("#")
        target = Path(os.path.normpath(source.parent / path))
        if not path or re.match(r"[a-z]+:", path) or not target.exists():
            return match[0]
        relative = os.path.relpath(site_path(target, root), os.path.dirname(page) or ".")
        return f"{match['before']}{relative}{anchor}{rest}"

    parts = re.split(f"({_CODE.pattern})", markdown, flags=_CODE.flags)
    return "".join(part if part.startswith("```") else _LINK.sub(replaced, part) for part in parts)


def _listed(folder: Path) -> list[Path]:
    """Return the files below a folder that are worth a page."""
    return sorted(file for file in folder.rglob("*") if file.suffix in _LANGUAGES and file.stat().st_size > 200)


def _page(path: Path, root: Path) -> str:
    """Return the page that shows a file or folder; a document is a page already."""
    if path.suffix == ".md":
        return path.read_text()
    name = path.relative_to(root).as_posix()
    heading = f"---\ntitle: {name}\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        lines = [f"- [`{file.relative_to(path)}`]({file.relative_to(path)}.md)" for file in _listed(path)]
        return heading + "\n".join(lines)
    if path.suffix == ".ipynb":
        return heading + _notebook(path, root)
    return heading + _fenced(path.read_text(), _LANGUAGES.get(path.suffix, "text"))


def _notebook(path: Path, root: Path) -> str:
    """Return a notebook's text and code, with what the code printed and drew."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(with_site_links(re.sub(r"^#", "##", text), path, site_path(path, root), root))
        else:
            parts += [_fenced(text, "python"), *map(_output, cell["outputs"])]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = {kind: "".join(content) for kind, content in output.get("data", {}).items()}
    if "image/png" in data:
        return f'<img alt="plot" src="data:image/png;base64,{data["image/png"].strip()}">'
    if "text/html" in data:
        return f"<div>{data['text/html']}</div>"
    return _fenced(data.get("text/plain") or "".join(output.get("text", "")), "text")


def _fenced(text: str, language: str) -> str:
    fence = "```" if "```" not in text else "````"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
