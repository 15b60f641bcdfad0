"""The `thresher evaluate` subcommand."""

from __future__ import annotations

from typing import Any

from ..shared.core.cli import PARTLY_FAILED, run_stage
from .config import EvaluateConfig

CONFIG = EvaluateConfig
SUMMARY = "Judge SAEs on held-out activations and, spliced, in the model."


def main(arguments: list[str]) -> int:
    """Run the stage and return its exit code."""
    return run_stage("evaluate", CONFIG, _run, SUMMARY, arguments)


def _run(config: EvaluateConfig) -> Any:
    from .run import evaluate  # here, so that --help stays quick

    return PARTLY_FAILED if any(row.get("error") for row in evaluate(config)) else 0
