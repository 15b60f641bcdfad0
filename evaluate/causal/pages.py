"""The commands' pages: one HTML file each that needs no network, in the report's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from ...shared.core.disk import write_file
from ...shared.core.version import thresher_version
from ..report.write import asset, environment, json_for_script

PageKind = Literal["steering", "attribution", "contrast"]
REPORT_SCRIPTS = ("dom.js", "axes.js")


def write_page(path: Path, kind: PageKind, title: str, model: str, found: Mapping[str, Any]) -> Path:
    """Write the page of a command's results, and return its path."""
    values = {"kind": kind, "title": title, "model": model, "found": found}
    return render_page(path, _own("page.html"), [], [_own(f"{kind}.js")], data=found, **values)


def render_page(
    path: Path, template: str, styles: Sequence[str], scripts: Sequence[str], *, data: Any, **values: Any
) -> Path:
    """Write a page from a template, with the report's style and helpers before its own, and return its path."""
    page = (
        environment()
        .from_string(template)
        .render(
            version=thresher_version(),
            has_folder=False,
            style=asset("report.css") + Markup("\n").join(map(Markup, [_own("page.css"), *styles])),
            script=Markup("\n").join([*map(asset, REPORT_SCRIPTS), *map(Markup, scripts)]),
            data=json_for_script(data),
            **values,
        )
    )
    write_file(path, page.encode())
    return path


def _own(name: str) -> str:
    return resources.files(__package__ or __name__).joinpath(name).read_text(encoding="utf-8")
