"""The `thresher train` subcommand."""

from __future__ import annotations

from typing import Any

from ..shared.cli import run_stage
from .config import TrainConfig

SUMMARY = "Train a sweep of SAEs from one stored run."


def main(arguments: list[str]) -> int:
    """Run the stage and return its exit code."""
    return run_stage("train", TrainConfig, _run, SUMMARY, arguments)


def _run(config: TrainConfig) -> Any:
    from .run import train  # here, so that --help stays quick

    return train(config)
