"""The `thresher` command: one subcommand per stage, each registered by its own package.

A subcommand is an entry point of the group `thresher.commands`. It names a module that imports quickly and defines
`SUMMARY`, `main(arguments)` and, if the subcommand takes a config file, `CONFIG`, the class of its configuration.
Nothing here imports a stage, and `--help` does not import torch.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import entry_points
from typing import Any, NoReturn

from .config import Config, ConfigT, help_text, load_config, read_toml
from .errors import ConfigError, ThresherError
from .terminal.logs import LogSettings, log_settings, shown_logs, take_log_flags
from .version import thresher_version

USAGE_ERROR = 2
FAULTS_FOUND = 1
"""Exit code of a command that checked something and found faults."""
PARTLY_FAILED = 3
"""Exit code of a stage in which some SAEs failed and others finished."""
_SWITCH_AFTER_SECONDS = 2e-4
_log = logging.getLogger(__name__)


def run_process(command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on this process's arguments and end the process with its exit code.

    Shorten the GIL switch interval; at Python's default, cores are idle about 5% of the time.

    atexit handlers registered after this call run; then the process exits without interpreter teardown, which takes up
    to a second.
    """
    sys.setswitchinterval(_SWITCH_AFTER_SECONDS)
    exit_now = _Exit()
    atexit.register(exit_now)  # registered first, so that it runs last
    try:
        exit_now.code = command(sys.argv[1:])
    except BaseException:
        atexit.unregister(exit_now)
        raise
    sys.exit(exit_now.code)


class _Exit:
    """Ends the process with an exit code, unless its output cannot be flushed."""

    code = 1

    def __call__(self) -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            return  # Python exits normally and reports the error
        os._exit(self.code)


def run_guarded(action: Callable[[], Any]) -> int:
    """Run `action` and return the exit code; log a user's error as one line."""
    with nullcontext() if log_settings() is not None else shown_logs(LogSettings()):
        return _guarded(action)


def _guarded(action: Callable[[], Any]) -> int:
    try:
        result = action()
    except ThresherError as error:
        _log.error(error.line(), extra={"fields": {"error": type(error).__name__}})
        return USAGE_ERROR
    except KeyboardInterrupt:
        _log.warning("interrupted; run the same command again to resume")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return result if isinstance(result, int) else 0


def run_stage(stage: str, cls: type[ConfigT], run: Callable[[ConfigT], Any], summary: str, arguments: list[str]) -> int:
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
    common = " and ".join(f"--{key}" for key in LogSettings.__struct_fields__)
    return (
        f"usage: thresher {stage} [CONFIG.toml] [--key value ...]\n\n{summary}\n\n{help_text(cls)}\n\n"
        f"Every command takes {common}: see `thresher --help`."
    )


def _of_another_stage(stage: str, cls: type[Config], arguments: list[str]) -> ConfigError | None:
    """Return an error if a config file's keys are all those of another stage and not of this one."""
    path = next((argument for argument in arguments if argument.endswith(".toml")), None)
    keys = read_toml(path).keys() if path else set()
    if keys <= set(cls.__struct_fields__):
        return None
    for name, entry in commands().items():
        config = getattr(entry.load(), "CONFIG", None)
        if config is not None and keys <= set(config.__struct_fields__):
            return ConfigError(f"'{path}' is a config file of `thresher {name}`, not of `thresher {stage}`")
    return None


def _exit_code(result: Any) -> int | None:
    """Return a stage's result if it is an exit code, else 0: other results are for callers in Python."""
    return result if isinstance(result, int) else None


def main(arguments: list[str] | None = None) -> int:
    """Run the subcommand that the first argument names and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_guarded(lambda: _run_logged(given))


def _run_logged(given: list[str]) -> int:
    """Run a command line with the log settings in it; in JSON, a bug is an object too."""
    settings, arguments = take_log_flags(given)
    with shown_logs(settings):
        try:
            return run_guarded(lambda: _run_command(arguments))
        except Exception as error:
            if settings.log_format == "text":
                raise
            _log.critical("a bug in Thresher", exc_info=True, extra={"fields": {"error": type(error).__name__}})
            return 1


def _run_command(arguments: list[str]) -> int:
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: thresher COMMAND ...\n\nTrain many sparse autoencoders from one language-model run.\n")
        for name, entry in known.items():
            print(f"  {name:<10} {entry.load().SUMMARY}")
        print("\n`thresher COMMAND --help` lists a command's options. Every command takes:\n")
        print(help_text(LogSettings))
        return 0
    if arguments[0] == "--version":
        print(f"thresher {thresher_version()}")
        return 0
    if arguments[0] not in known:
        raise ConfigError(f"no command '{arguments[0]}'; expected one of: {', '.join(known)}")
    return known[arguments[0]].load().main(arguments[1:])


def run(stage: str | None = None) -> NoReturn:
    """Run the `thresher` command in this process; with a stage, the arguments are those of that command.

    A shell that completes a command line runs `thresher` with `_ARGCOMPLETE` set.
    """
    if "_ARGCOMPLETE" in os.environ and stage is None:
        commands()["completion"].load().answer_shell()
    run_process(main if stage is None else lambda arguments: main([stage, *arguments]))


def commands() -> dict[str, Any]:
    """Return the entry points of the subcommands by name, the stages first."""
    return {entry.name: entry for entry in sorted(entry_points(group="thresher.commands"), key=_order)}


def _order(entry: Any) -> tuple[int, str]:
    stages = ["harvest", "train", "evaluate", "explain"]
    return (stages.index(entry.name) if entry.name in stages else len(stages), entry.name)
