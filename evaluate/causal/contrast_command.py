"""The `thresher contrast` subcommand."""

from __future__ import annotations

from typing import Any

from ...shared.core.cli import run_stage
from .config import ContrastConfig

CONFIG = ContrastConfig
SUMMARY = "Find the latents that tell two sets of texts apart, and ablate them."


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_stage("contrast", CONFIG, _run, SUMMARY, arguments)


def _run(config: ContrastConfig) -> Any:
    from .run import report_contrast  # here, so that --help stays quick

    report_contrast(config)
    return 0
