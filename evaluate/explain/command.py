"""The `thresher explain` subcommand."""

from __future__ import annotations

from ...shared.core.cli import PARTLY_FAILED, asks_for_help, run_guarded, run_stage, stage_help
from ...shared.core.config import help_text
from .config import ExplainConfig
from .llm.config import LlmConfig

CONFIG = ExplainConfig
SUMMARY = "Explain latents in words, and score the explanations on held-out documents."


def main(arguments: list[str]) -> int:
    """Run the stage and return its exit code."""
    if asks_for_help(arguments):
        return run_guarded(_print_help)
    return run_stage("explain", CONFIG, _run, SUMMARY, arguments)


def _print_help() -> None:
    print(stage_help("explain", CONFIG, SUMMARY))
    print(f"\nkeys of the [llm] table:\n\n{help_text(LlmConfig, dashes='')}", flush=True)


def _run(config: ExplainConfig) -> int:
    from .run import explain  # here, so that --help stays quick

    return 0 if explain(config).complete else PARTLY_FAILED
