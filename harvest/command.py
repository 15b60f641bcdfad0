"""The `thresher harvest` subcommand."""

from __future__ import annotations

from typing import Any

from ..shared.core.cli import run_stage
from .config import HarvestConfig

CONFIG = HarvestConfig
SUMMARY = "Run a language model once and write its activations to a store."


def main(arguments: list[str]) -> int:
    """Run the stage and return its exit code."""
    return run_stage("harvest", CONFIG, _run, SUMMARY, arguments)


def _run(config: HarvestConfig) -> Any:
    from .run import harvest  # imported here to keep --help fast

    return harvest(config)
