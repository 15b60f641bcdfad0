"""The actions of `thresher sae` and their options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

from ..core.cli import FAULTS_FOUND
from ..core.config import Config, action_config
from ..core.errors import ConfigError, MissingFileError
from ..core.paths import user_path
from ..core.terminal.results import print_result
from ..sae.formats import SaeFormat, walk_saes
from ..sae.sources import locate_source
from .config import ConvertConfig, PushSaeConfig, SourceConfig, TargetConfig

_log = logging.getLogger(__name__)

_C = TypeVar("_C", bound=Config)


def run_sae_command(arguments: list[str]) -> int:
    """Run `info`, `convert`, `verify`, `push` or `pull`."""
    action, rest = arguments[0], arguments[1:]
    actions = {"info": _info, "convert": _convert, "verify": _verify, "push": _push, "pull": _pull}
    if action not in actions:
        raise ConfigError(f"no action '{action}'; expected one of: {', '.join(actions)}")
    return actions[action](rest)


def _options(cls: type[_C], arguments: list[str], action: str, *names: str) -> _C:
    """Return the configuration of an action, whose first arguments are the values of `names`."""
    missing = f"`thresher sae {action}` needs {' and '.join(names)} first; see thresher sae --help"
    return action_config(cls, arguments, names, missing, "options, --key value")


def found_saes(source: str) -> tuple[Path, list[tuple[SaeFormat, Path]]]:
    """Return where a source is on this machine and the SAEs in it, after a line for each folder not recognised.

    Raises:
        MissingFileError: there is no SAE.
    """
    path = locate_source(source, several=True).path
    found, notes = walk_saes(path)
    for note in notes:
        _log.info(f"note: {note}")
    if not found:
        raise MissingFileError(f"no SAE in '{source}'; docs/formats.md lists the files of each format")
    return path, found


def _info(arguments: list[str]) -> int:
    from .describe import describe_sae

    config = _options(SourceConfig, arguments, "info", "source")
    root, found = found_saes(config.source)
    print_result("\n\n".join("\n".join(describe_sae(fmt, path, root)) for fmt, path in found))
    return 0


def _verify(arguments: list[str]) -> int:
    from .verify import verify_sae

    config = _options(SourceConfig, arguments, "verify", "source")
    root, found = found_saes(config.source)
    n_faults = 0
    for fmt, path in found:
        fault = verify_sae(fmt, path)
        n_faults += fault is not None
        name = path.relative_to(root) if path != root else path.name
        print_result(f"fault  {name}: {fault}" if fault else f"ok     {name}  {fmt.name}")
    print_result(f"{len(found)} SAEs, {n_faults} with faults")
    return FAULTS_FOUND if n_faults else 0


def _convert(arguments: list[str]) -> int:
    from .convert import convert

    config = _options(ConvertConfig, arguments, "convert", "source", "folder")
    if config.approximate != (config.store is not None):
        raise ConfigError("--approximate and --store go together: what is lost is measured on the store's rows")
    root, found = found_saes(config.source)
    for line in convert(found, root, user_path(config.folder), config.format, config.store, config.rows):
        print_result(line)
    return 0


def _push(arguments: list[str]) -> int:
    from .push import push

    config = _options(PushSaeConfig, arguments, "push", "source")
    evaluation = user_path(config.evaluation) if config.evaluation else None
    for line in push(user_path(config.source), config.repo, evaluation, config.license, config.private, config.dry_run):
        print_result(line)
    return 0


def _pull(arguments: list[str]) -> int:
    from .pull import pull

    config = _options(TargetConfig, arguments, "pull", "source", "folder")
    for line in pull(config.source, user_path(config.folder)):
        print_result(line)
    return 0
