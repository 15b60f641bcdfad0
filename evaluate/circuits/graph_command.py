"""The `thresher graph` subcommand."""

from __future__ import annotations

from typing import Any

from ...shared.core.cli import run_stage
from .config import GraphConfig

CONFIG = GraphConfig
SUMMARY = "Trace a prediction through transcoders: an attribution graph."


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_stage("graph", CONFIG, _run, SUMMARY, arguments)


def _run(config: GraphConfig) -> Any:
    from .run import graph  # here, so that --help stays quick

    graph(config)
    return 0
