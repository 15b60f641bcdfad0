"""Print what a command was run for, such as a table of metrics, on stdout; messages go to stderr (`logs.py`)."""

from __future__ import annotations

import sys

from .logs import ROOT_LOGGER, json_line, log_settings, write_line


def print_result(text: str) -> None:
    """Print a result as it is; with `--log_format json`, as an object whose logger is `thresher.results`."""
    settings = log_settings()
    if settings is not None and settings.log_format == "json":
        text = json_line("info", f"{ROOT_LOGGER}.results", text)
    write_line(text, sys.stdout)
