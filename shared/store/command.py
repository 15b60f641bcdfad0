"""The `thresher store` subcommand: describe, verify, sample, upload or download a store."""

from __future__ import annotations

SUMMARY = "Show, verify, sample, upload or download an activation store."
USAGE = """usage: thresher store info PATH
       thresher store verify PATH
       thresher store sample PATH [--contexts N] [--seed N] [--tokenizer PATH]
       thresher store push FOLDER --repo USER/NAME [--license NAME] [--private]
       thresher store pull hf://datasets/USER/NAME@revision FOLDER

Show what a store holds; check every checksum in it; print some contexts with the norms of their rows; upload it to the
Hugging Face Hub or download one, which the same command resumes after an interruption.
PATH is a folder, or a URL such as s3://bucket/prefix (docs/object-stores.md).
"""


def main(arguments: list[str]) -> int:
    """Run an action and return the exit code."""
    from ..core.cli import run_guarded

    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0 if arguments else 2

    def run() -> int:
        if arguments[0] in ("push", "pull"):
            from .share.actions import run_hub_command

            return run_hub_command(arguments)
        from .read.inspect import run_store_command  # imported here to keep --help fast

        return run_store_command(arguments)

    return run_guarded(run)
