"""What MkDocs does not do by itself: the home page, links to files outside of docs, and pages from the code.

MkDocs calls the functions `on_...` while it builds (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from outside import outside_pages, site_path, with_site_links
from settings import commands_page, keys_table

ROOT = Path(__file__).parents[2]
API = ROOT / "build" / "api"


@event_priority(100)  # before mkdocstrings looks for it
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay out the package as it is imported, for mkdocstrings: its folders are beside each other in the repository."""
    shutil.rmtree(API, ignore_errors=True)
    for name in ("thresher", "shared", "harvest", "train", "evaluate"):
        package = API / "thresher" / ("" if name == "thresher" else name)
        for file in (ROOT / name).rglob("*.py"):
            link = package / file.relative_to(ROOT / name)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, link)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the home page, every file outside of docs that is linked, and the pages from the code."""
    generated = {"index.md": (ROOT / "README.md").read_text(), "reference/commands.md": commands_page()}
    for path, content in (generated | outside_pages(ROOT)).items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links lead to the site's pages, and follow each configuration with the table of its keys."""
    source = _source(page.file)
    if source is not None:
        markdown = with_site_links(markdown, source, page.file.src_uri, ROOT)
    return re.sub(r"^::: thresher\.(\w+Config)$", _configuration, markdown, flags=re.MULTILINE)


def _source(file: File) -> Path | None:
    """Return the file of the repository that a page shows, or None for a page from the code."""
    if file.generated_by is None:
        return ROOT / "docs" / file.src_uri
    found = [path for path in (ROOT / "README.md", *_documents()) if site_path(path, ROOT) == file.src_uri]
    return found[0] if found else None


def _documents() -> list[Path]:
    return [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "models").glob("*/README.md")]


def _configuration(match: re.Match[str]) -> str:
    """Return the block of a configuration without its fields, and the table of its keys."""
    return f"{match[0]}\n    options:\n      members: false\n\n{keys_table(match[1])}"
