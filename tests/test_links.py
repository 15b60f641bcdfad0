"""Links within the documents: every file exists, every anchor is a heading of it, and every path in code exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*/*.md")])
    if page.name != "CHANGELOG.md"  # it names files as they were
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
SOURCES = ("shared", "harvest", "train", "evaluate", "tests", "configs", "docs", "benchmarks", "examples", "tools")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """Return the anchors that GitHub gives to a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        while anchor in found:
            anchor += "-1"
        found.add(anchor)
    return found


def faults(page):
    text = without_code(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"
    for path in re.findall(r"`((?:" + "|".join(SOURCES) + r")/[\w./-]+)`", text):
        if not (ROOT / path).exists():
            yield f"`{path}`: no such file"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_paths_of_a_page_exist(page):
    assert list(faults(page)) == []


def test_every_page_is_linked_from_another():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if link.partition("#")[0] and not re.match(r"[a-z]+:", link)
    }
    assert [str(page.relative_to(ROOT)) for page in PAGES if page.name != "README.md" and page not in linked] == []


def test_the_check_finds_what_is_wrong(tmp_path):
    (tmp_path / "other.md").write_text("# A `b` (c), d\n## Two\n## Two\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#a-b-c-d) [b](other.md#two-1) [x](none.md) [y](other.md#three) [z](#here) [w](https://x.org/#q)\n"
        "```\n[no](link.md)\n```\n`train/run.py` `train/none.py`\n"
    )
    assert [fault.split(":")[0] for fault in faults(page)] == [
        "none.md",
        "other.md#three",
        "#here",
        "`train/none.py`",
    ]
