"""The `thresher microscope` subcommand."""

from __future__ import annotations

from ...shared.core.config import Config

SUMMARY = "Browse, search, try text on and steer latents in the browser."


def actions() -> dict[str, type[Config]]:
    """Return the options of the command, which has one action without a name."""
    from .config import MicroscopeConfig

    return {"": MicroscopeConfig}


def main(arguments: list[str]) -> int:
    """Serve a run until the process is interrupted, and return the exit code."""
    from ...shared.core.cli import asks_for_help, run_guarded

    return run_guarded(_print_help if asks_for_help(arguments) else lambda: _serve(arguments))


def _print_help() -> None:
    from ...shared.core.config import help_text
    from .config import MicroscopeConfig

    print("usage: thresher microscope RUN [--host 127.0.0.1] [--port N] [--open false] [--key value ...]\n")
    print("Serve what the pipeline wrote as a web application on this machine (docs/microscope.md).\n")
    print(help_text(MicroscopeConfig))


def _serve(arguments: list[str]) -> int:
    from ...shared.core.config import action_config
    from .config import MicroscopeConfig

    config = action_config(
        MicroscopeConfig,
        arguments,
        ("run",),
        "expected the folder of a run: thresher microscope RUN, as in `thresher microscope runs/demo`",
        "options, --key value",
    )
    from .run import microscope  # here, so that --help stays quick

    return microscope(config)
