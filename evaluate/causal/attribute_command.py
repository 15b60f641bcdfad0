"""The `thresher attribute` subcommand."""

from __future__ import annotations

from typing import Any

from ...shared.core.cli import run_stage
from .config import AttributeConfig

CONFIG = AttributeConfig
SUMMARY = "Score what each latent adds to a prediction, token by token."


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_stage("attribute", CONFIG, _run, SUMMARY, arguments)


def _run(config: AttributeConfig) -> Any:
    from .run import report_attribution  # here, so that --help stays quick

    report_attribution(config)
    return 0
