"""The `thresher store` subcommand: describe, verify or sample a store."""

from __future__ import annotations

SUMMARY = "Show, verify or sample an activation store."
USAGE = """usage: thresher store info PATH
       thresher store verify PATH
       thresher store sample PATH [--contexts N] [--seed N] [--tokenizer PATH]

Show what a store holds; check every checksum in it; print some contexts with the norms of their rows.
PATH is a folder, or a URL such as s3://bucket/prefix (docs/object-stores.md).
"""


def main(arguments: list[str]) -> int:
    """Run `info`, `verify` or `sample` and return the exit code."""
    from ..core.cli import run_guarded

    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0 if arguments else 2

    def run() -> int:
        from .read.inspect import run_command  # here, so that --help stays quick

        return run_command(arguments)

    return run_guarded(run)
