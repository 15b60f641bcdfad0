"""The `thresher sae` subcommand: describe, convert, verify, upload or download SAEs."""

from __future__ import annotations

from ..core.config import Config

SUMMARY = "Show, convert, verify, upload or download SAEs."
USAGE = """usage: thresher sae info SOURCE
       thresher sae convert SOURCE FOLDER --format NAME [--approximate --store PATH] [--rows N]
       thresher sae verify SOURCE
       thresher sae push FOLDER --repo USER/NAME [--evaluation FOLDER] [--license NAME] [--private] [--dry_run]
       thresher sae pull hf://USER/NAME/path@revision FOLDER

Show what SAEs are and what reading folded; write them in another format; check that they are read, finite and written
again as the same bytes; upload a sweep to the Hugging Face Hub with a model card; download SAEs.
SOURCE is a folder, a file, a folder of several, hf://USER/REPO/path@revision or a release's name (docs/formats.md).
"""


def actions() -> dict[str, type[Config]]:
    """Return the options of each action."""
    from .config import ACTIONS

    return ACTIONS


def main(arguments: list[str]) -> int:
    """Run an action and return the exit code."""
    from ..core.cli import run_guarded

    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0 if arguments else 2

    def run() -> int:
        from .actions import run_sae_command  # here, so that --help stays quick

        return run_sae_command(arguments)

    return run_guarded(run)
