"""The documentation site: it builds without warnings, shows every public name, and fetches nothing from elsewhere."""

from __future__ import annotations

import fcntl
import html
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec.inspect
import pytest

import thresher

from ..evaluate.chromium import CHROMIUM, SWITCHES, Tab

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory, worker_id):
    """Build the site as `make docs` does, which makes an error of a broken link, and return its folder.

    One of the test processes builds it for all, because a build first clears the folder of its copied package.
    """
    if worker_id == "master":
        folder = tmp_path_factory.mktemp("site") / "site"
    else:
        folder = tmp_path_factory.getbasetemp().parent / "site"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            build_site(folder)
    return folder


def build_site(folder: Path) -> None:
    """Build the site in a folder, which appears only once the build has succeeded."""
    part = folder.with_suffix(".part")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(part)]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Documentation built" in done.stderr  # with --quiet, --strict would not count warnings
    part.rename(folder)


def plain(text: str) -> str:
    """Return the words of HTML or of a docstring."""
    without_tags = html.unescape(re.sub(r"<[^>]*>", "", text))
    return " ".join(re.sub(r"[`*]", "", without_tags).split())


@pytest.fixture(scope="module")
def reference(site):
    """Return the pages of the Python reference by name."""
    return {page.stem: page.read_text() for page in (site / "reference").glob("*.html")}


def first_sentence(thing: object) -> str:
    return plain(inspect.cleandoc(thing.__doc__ or "").partition("\n\n")[0])


def test_every_public_name_is_on_a_page_with_its_docstring(reference):
    missing, words_of = [], {name: plain(page) for name, page in reference.items()}
    for name in thresher.__all__:
        shown = [
            page for page, text in reference.items() if re.search(rf'id="thresher\.(?:{name}\.run\.)?{name}"', text)
        ]
        if len(shown) != 1:
            missing.append(f"{name}: on {len(shown)} pages")
            continue
        thing = getattr(thresher, name)
        thing = getattr(thing, name) if inspect.ismodule(thing) else thing
        things = {name: thing} if name != "__version__" else {}
        if inspect.isclass(thing):
            own = {key: getattr(thing, key) for key, value in vars(thing).items() if inspect.isroutine(value)}
            # What has another name is a hook of a library, such as `extra_repr`.
            own = {key: value for key, value in own.items() if getattr(value, "__name__", key) == key}
            things |= {f"{name}.{key}": value for key, value in own.items() if key[0] != "_" and value.__doc__}
        words = words_of[shown[0]]
        missing += [key for key, value in things.items() if not value.__doc__ or first_sentence(value) not in words]
    assert missing == []


@pytest.mark.parametrize("stage", ["HarvestConfig", "TrainConfig", "EvaluateConfig"])
def test_every_key_of_a_stage_is_on_its_page(stage, reference):
    words = plain(reference["stages"])
    for field in msgspec.inspect.type_info(getattr(thresher, stage)).fields:
        description = re.sub(r"docs/([\w-]+)\.md", r"\1", field.type.extra_json_schema["description"])
        assert f"{field.name} " in words
        assert plain(description) in words


def test_raised_errors_are_shown(reference):
    words = plain(reference["stores"])
    assert re.search(r"NonFiniteError . a batch holds NaN or infinity\.", words)


def test_nothing_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        assert (
            re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*', page.read_text()) == []
        )


def test_files_outside_of_docs_are_pages(site):
    readme = (site / "index.html").read_text()
    assert 'href="repository/examples/harvest_with_nnsight.py.html"' in readme
    shown = plain((site / "repository/configs/harvest/demo.toml.html").read_text())
    assert 'hook_points = ["blocks.' in shown
    assert 'href="harvest/demo.toml.html"' in (site / "repository/configs/index.html").read_text()


def test_links_lead_to_where_the_site_has_the_file(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("outside", ROOT / "tools/site/outside.py")
    outside = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outside)
    for name in ("README.md", "docs/a.md", "docs/deep/README.md", "docs/images/i.png", "configs/x.toml", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 300)
    text = (
        "[a](../a.md#part) ![i](../images/i.png) [r](../../README.md) [c](../../configs) [x](../../configs/x.toml)\n"
        '[l](../../LICENSE) [d](.) [s](#here) [w](https://x.org/a.md) [n](none.md) <img src="../images/i.png">\n'
        "```\n[code](../a.md)\n```\n"
    )
    assert outside.with_site_links(text, tmp_path / "docs/deep/README.md", "deep/README.md", tmp_path) == (
        "[a](../a.md#part) ![i](../images/i.png) [r](../index.md) [c](../repository/configs/index.md) "
        "[x](../repository/configs/x.toml.md)\n"
        "[l](../repository/LICENSE.md) [d](README.md) [s](#here) [w](https://x.org/a.md) [n](none.md) "
        '<img src="../images/i.png">\n```\n[code](../a.md)\n```\n'
    )
    (tmp_path / "README.md").write_text("[c](configs) [a](docs/a.md)")
    pages = outside.outside_pages(tmp_path)
    assert pages.keys() == {"repository/configs/index.md", "repository/configs/x.toml.md"}
    assert "(x.toml.md)" in pages["repository/configs/index.md"]


def test_the_search_works_in_a_page_that_is_opened_as_a_file(site):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES) as browser,
    ):
        tab = Tab(browser)
        tab.open(site / "reference" / "saes.html", ready="input.md-search__input")
        tab.page.locator("input.md-search__input").click()
        tab.page.keyboard.type("held-out documents", delay=20)
        first = tab.page.locator(".md-search-result__link").first
        first.wait_for()
        assert first.get_attribute("href").startswith((site / "").as_uri())
        assert tab.faults == []
