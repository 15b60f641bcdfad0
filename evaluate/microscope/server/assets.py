"""The files of the page: the microscope's own, and the report's components and style, all read once at the start."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

from ... import circuits, report
from .. import page

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
REPORT_MODULES = ("dom.js", "axes.js", "pareto.js", "curves.js", "histograms.js", "latent.js")


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return the content and the type of every file, by its address. No other file can be asked for."""
    own, parts = ({entry.name: entry for entry in folder.iterdir()} for folder in _page_folders())
    shared = {name: resources.files(report.__name__).joinpath(name) for name in (*REPORT_MODULES, "report.css")}
    graph = {name: resources.files(circuits.__name__).joinpath(name) for name in ("graph.js", "graph.css")}
    found = {}
    for folder, files in (("", own), ("parts/", parts), ("report/", shared), ("circuits/", graph)):
        for name, entry in files.items():
            kind = name.rpartition(".")[2]
            if kind in MEDIA_TYPES:
                found[f"/{folder}{name}"] = (entry.read_bytes(), MEDIA_TYPES[kind])
    found["/"] = found.pop("/index.html")
    return found


def _page_folders() -> tuple[Traversable, Traversable]:
    folder = resources.files(page.__name__)
    return folder, folder.joinpath("parts")
