"""The `thresher evaluate` subcommand."""

from __future__ import annotations

from typing import Any

from ..shared.core.cli import PARTLY_FAILED, run_stage
from .config import EvaluateConfig

CONFIG = EvaluateConfig
SUMMARY = "Evaluate SAEs on held-out activations, and in the model with each SAE spliced in."


def main(arguments: list[str]) -> int:
    """Run the stage and return its exit code."""
    return run_stage("evaluate", CONFIG, _run, SUMMARY, arguments)


def _run(config: EvaluateConfig) -> Any:
    from .run import evaluate  # imported here to keep --help fast

    return PARTLY_FAILED if any(row.get("error") for row in evaluate(config)) else 0
