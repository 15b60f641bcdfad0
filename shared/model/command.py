"""The `thresher hooks` subcommand: which canonical hook points a model has."""

from __future__ import annotations

from typing import Any

from ..core.config import Config, help_text, load_config
from ..core.errors import ConfigError
from .hooks_config import HooksConfig

SUMMARY = "List a model's hook points: width, module, and the identity that was measured."


def actions() -> dict[str, type[Config]]:
    """Return the options of the command, which has one action without a name."""
    return {"": HooksConfig}


def main(arguments: list[str]) -> int:
    """Print the hook points of the model that the first argument names, and return the exit code."""
    from ..core.cli import run_guarded

    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"usage: thresher hooks MODEL [--key value ...]\n\n{SUMMARY}\n\n{help_text(HooksConfig)}")
        return 0 if arguments else 2

    def run() -> Any:
        config = _config(arguments)
        from ..core.lazy import fast_imports

        with fast_imports():
            from .table import print_hook_points  # imported here to keep --help fast

            print_hook_points(config)

    return run_guarded(run)


def _config(arguments: list[str]) -> HooksConfig:
    is_model = not arguments[0].startswith("-")
    if is_model and arguments[0].endswith(".toml"):
        raise ConfigError(f"'{arguments[0]}' is a config file; expected the model itself: thresher hooks MODEL")
    return load_config(HooksConfig, None, ["--model", *arguments] if is_model else arguments)
