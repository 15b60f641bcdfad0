"""The `thresher demo` subcommand: the whole pipeline on what comes with the package."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from thresher.shared.core.cli import asks_for_help, run_guarded
from thresher.shared.core.errors import ConfigError
from thresher.shared.core.terminal.logs import log_settings
from thresher.shared.core.terminal.results import print_result

SUMMARY = "Run every stage on the bundled model and this Python's standard library."
DEMO_STAGES = ("harvest", "train", "evaluate", "attribute", "steer", "explain")
DEMO_REPORT = Path("runs/demo/evaluation/report.html")
USAGE = f"""usage: thresher demo

{SUMMARY}

It needs no network and no GPU, takes about six minutes on two cores, and writes 3 GB to runs/demo. It runs
the commands {", ".join(DEMO_STAGES[:-1])} and {DEMO_STAGES[-1]}, each with configs/STAGE/demo.toml.
A configuration that the working directory lacks is written there first, for you to change. The same command resumes a
demo that was interrupted.
"""


def main(arguments: list[str]) -> int:
    """Run the demo in the working directory and return the exit code of the first stage that failed, or 0."""
    if asks_for_help(arguments):
        return run_guarded(lambda: print(USAGE, end="", flush=True))
    return run_guarded(lambda: run_demo(arguments))


def run_demo(arguments: list[str]) -> int:
    """Run each stage in a process of its own, and print its command.

    Raises:
        ConfigError: arguments were given.
    """
    if arguments:
        raise ConfigError(
            f"`thresher demo` takes no arguments, got '{arguments[0]}'; change configs/STAGE/demo.toml and run a stage"
        )
    settings = log_settings()
    logs = [] if settings is None else settings.arguments()
    for stage in DEMO_STAGES:
        config = _config(stage)
        print_result(f"$ thresher {stage} {config}")
        run = "from thresher.shared.core.cli import run; run()"
        code = subprocess.run([sys.executable, "-P", "-c", run, stage, str(config), *logs]).returncode
        if code:
            return code
    print_result(f"open {DEMO_REPORT} in a browser")
    return 0


def _config(stage: str) -> Path:
    """Return the path of a stage's configuration in the working directory, where it is written if it is missing."""
    path = Path("configs", stage, "demo.toml")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((files("thresher.configs") / stage / "demo.toml").read_bytes())
    return path
