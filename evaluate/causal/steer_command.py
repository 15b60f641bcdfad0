"""The `thresher steer` subcommand."""

from __future__ import annotations

from typing import Any

from ...shared.core.cli import run_stage
from .config import SteerConfig

CONFIG = SteerConfig
SUMMARY = "Steer a latent at several strengths: effect, damage, and texts."


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_stage("steer", CONFIG, _run, SUMMARY, arguments)


def _run(config: SteerConfig) -> Any:
    from .run import steer  # here, so that --help stays quick

    steer(config)
    return 0
