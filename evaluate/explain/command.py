"""The `thresher explain` subcommand."""

from __future__ import annotations

from ...shared.core.cli import run_stage
from .config import ExplainConfig

CONFIG = ExplainConfig
SUMMARY = "Explain latents in words, and score the explanations on held-out documents."


def main(arguments: list[str]) -> int:
    """Run the stage and return its exit code."""
    return run_stage("explain", CONFIG, _run, SUMMARY, arguments)


def _run(config: ExplainConfig) -> None:
    from .run import explain  # here, so that --help stays quick

    explain(config)
