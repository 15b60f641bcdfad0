"""The `thresher` command: one subcommand per stage, each registered by its own package.

A subcommand is an entry point of the group `thresher.commands` that names a light module with
`SUMMARY` and `main(arguments)`, and `CONFIG`, its configuration's class, if it takes a config file.
Nothing here imports a stage, and `--help` imports no torch.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, NoReturn

from .config import C, Config, describe, load_config, read_toml
from .errors import ConfigError, ThresherError
from .version import thresher_version

USAGE_ERROR = 2
PARTLY_FAILED = 3
"""Exit code of a stage in which some SAEs failed and others finished."""
_SWITCH_AFTER_SECONDS = 2e-4


def run_process(command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on this process's arguments and end the process with its exit code.

    A thread that waits for the interpreter has it soon: cores otherwise stand still for a twentieth of their time.

    All that was registered since to run at the end runs. After that the process ends at once: object by object, Python
    takes up to a second to take PyTorch and transformers apart.
    """
    sys.setswitchinterval(_SWITCH_AFTER_SECONDS)
    ending = _Ending()
    atexit.register(ending)  # the first to be registered is the last to run
    try:
        ending.code = command(sys.argv[1:])
    except BaseException:
        atexit.unregister(ending)
        raise
    sys.exit(ending.code)


class _Ending:
    """Ends the process with a code, if what it printed can still be written."""

    code = 1

    def __call__(self) -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            return  # Python then ends the process its own way, and tells of it
        os._exit(self.code)


def run_guarded(action: Callable[[], Any]) -> int:
    """Run `action`; print a user's error as one line and return the exit code."""
    try:
        result = action()
    except ThresherError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; start the same command again to resume", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return result if isinstance(result, int) else 0


def run_stage(stage: str, cls: type[C], run: Callable[[C], Any], summary: str, arguments: list[str]) -> int:
    """Run one configured stage: `thresher STAGE [CONFIG.toml] [--key value ...]`.

    `run` may return an exit code, such as `PARTLY_FAILED`.
    """
    if asks_for_help(arguments):
        return run_guarded(lambda: print(stage_help(stage, cls, summary), flush=True))

    def run_configured() -> Any:
        try:
            config = load_config(cls, None, arguments)
        except ConfigError as error:
            raise _of_another_stage(stage, cls, arguments) or error from None
        return run(config)

    return run_guarded(lambda: _exit_code(run_configured()))


def asks_for_help(arguments: list[str]) -> bool:
    """Return whether a command line asks for help."""
    return "--help" in arguments or "-h" in arguments


def stage_help(stage: str, cls: type[Config], summary: str) -> str:
    """Return a stage's usage and the keys of its configuration."""
    return f"usage: thresher {stage} [CONFIG.toml] [--key value ...]\n\n{summary}\n\n{describe(cls)}"


def _of_another_stage(stage: str, cls: type[Config], arguments: list[str]) -> ConfigError | None:
    """Return the error that a config file is another stage's, where all of its keys are that stage's and not this."""
    path = next((argument for argument in arguments if argument.endswith(".toml")), None)
    keys = read_toml(path).keys() if path else set()
    if keys <= set(cls.__struct_fields__):
        return None
    for name, entry in _commands().items():
        config = getattr(entry.load(), "CONFIG", None)
        if config is not None and keys <= set(config.__struct_fields__):
            return ConfigError(f"'{path}' is a config file of `thresher {name}`, not of `thresher {stage}`")
    return None


def _exit_code(result: Any) -> int | None:
    """Return what a stage returns if it is an exit code; whatever else it returns is for callers in Python."""
    return result if isinstance(result, int) else None


def main(arguments: list[str] | None = None) -> int:
    """Dispatch to the subcommand that the first argument names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: thresher COMMAND ...\n\nTrain many sparse autoencoders from one language-model run.\n")
        for name, entry in commands.items():
            print(f"  {name:<10} {entry.load().SUMMARY}")
        print("\n`thresher COMMAND --help` lists a command's options.")
        return 0
    if arguments[0] == "--version":
        print(f"thresher {thresher_version()}")
        return 0
    if arguments[0] not in commands:
        print(f"error: no command '{arguments[0]}'; expected one of: {', '.join(commands)}", file=sys.stderr)
        return USAGE_ERROR
    return commands[arguments[0]].load().main(arguments[1:])


def run() -> NoReturn:
    """Be the `thresher` command."""
    run_process(main)


def _commands() -> dict[str, Any]:
    return {entry.name: entry for entry in sorted(entry_points(group="thresher.commands"), key=_order)}


def _order(entry: Any) -> tuple[int, str]:
    stages = ["harvest", "train", "evaluate"]
    return (stages.index(entry.name) if entry.name in stages else len(stages), entry.name)
