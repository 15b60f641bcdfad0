"""The `thresher train` subcommand."""

from __future__ import annotations

import os
import sys
from typing import Any

from ..shared.core.cli import PARTLY_FAILED, asks_for_help, run_guarded, run_stage, stage_help
from ..shared.core.compute.launcher import is_first_launched, n_launched
from ..shared.core.lazy import fast_imports
from .config import TrainConfig

CONFIG = TrainConfig
SUMMARY = "Train a sweep of SAEs from one stored run."


def main(arguments: list[str]) -> int:
    """Run the stage, or print its help or an architecture's, and return the exit code."""
    if asks_for_help(arguments):
        return run_guarded(lambda: _print_help(arguments))
    return run_stage("train", CONFIG, _run, SUMMARY, arguments)


def _print_help(arguments: list[str]) -> None:
    others = [argument for argument in arguments if argument not in ("--help", "-h")]
    of_one = len(others) == 1 and not others[0].startswith("-") and not others[0].endswith(".toml")
    if not of_one:
        print(stage_help("train", CONFIG, SUMMARY), end="\n\n", flush=True)
    with fast_imports():
        from .help import help_on_architecture, help_on_saes  # here, because PyTorch takes a second to import
    print(help_on_architecture(others[0]) if of_one else help_on_saes(), flush=True)


def _run(config: TrainConfig) -> Any:
    with fast_imports():
        from .memory import keep_freed_memory  # here, so that --help stays quick
        from .run import train

    keep_freed_memory()

    def code_of_training() -> int:
        return PARTLY_FAILED if train(config).diverged and is_first_launched() else 0

    if n_launched() == 1:
        return code_of_training()
    from .parallel.failure_report import report_failure_once

    code = report_failure_once(code_of_training)
    if code:
        # Not `sys.exit`, which waits for threads: those of a process group that has lost a member never end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
