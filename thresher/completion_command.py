"""The `thresher completion` subcommand, and the answers that the shell asks for while one types."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import msgspec

from thresher.shared.core.cli import asks_for_help, commands, run_guarded
from thresher.shared.core.config import Config, read_toml
from thresher.shared.core.config_values import accepted_types, choices
from thresher.shared.core.errors import ConfigError, ThresherError
from thresher.shared.core.terminal.logs import LogSettings
from thresher.shared.core.terminal.results import print_result

SUMMARY = "Print the script that completes commands, keys and hook points in bash, zsh or fish."
SHELLS = ("bash", "zsh", "fish")
USAGE = f"""usage: thresher completion {"|".join(SHELLS)}

{SUMMARY}

  bash   eval "$(thresher completion bash)"                                        in ~/.bashrc
  zsh    autoload -U compinit && compinit && eval "$(thresher completion zsh)"     in ~/.zshrc
  fish   thresher completion fish > ~/.config/fish/completions/thresher.fish

It needs the extra thresher[completion].
"""
_POSITIONALS = {"hooks": ("model",), "microscope": ("run",)}
_OF_ACTIONS = ("source", "folder", "path", "store")
"""The keys that actions take as their first arguments, without a name."""


def main(arguments: list[str]) -> int:
    """Print a shell's script and return the exit code."""
    if asks_for_help(arguments):
        return run_guarded(lambda: print(USAGE, end="", flush=True))
    return run_guarded(lambda: _print_script(arguments))


def _print_script(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise ConfigError(f"expected one of {', '.join(SHELLS)}: thresher completion SHELL")
    if find_spec("argcomplete") is None:
        raise ConfigError("completion needs argcomplete; install the extra: pip install 'thresher[completion]'")
    import argcomplete

    print_result(argcomplete.shellcode(["thresher"], shell=arguments[0]).rstrip())


def answer_shell() -> None:
    """Write what may come next to the shell that asks, by argcomplete's protocol, and end the process."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0")) or None].split(" ")
    argcomplete.autocomplete(parser_for(words[1:-1]), always_complete_options="long")


def parser_for(words: list[str]) -> ArgumentParser:
    """Return a parser for completion alone, of the command that the words before the cursor begin."""
    parser = ArgumentParser(prog="thresher", add_help=False)
    names = commands()
    typed = [word for word in words if not word.startswith("-")]
    command = typed[0] if typed and typed[0] in names else None
    parser.add_argument("command", choices=[command] if command else list(names))
    fields: Mapping[str, Any] = {}
    if command is not None:
        module = names[command].load()
        actions = module.actions() if hasattr(module, "actions") else {"": getattr(module, "CONFIG", Config)}
        if "" not in actions:
            action = typed[1] if len(typed) > 1 and typed[1] in actions else None
            parser.add_argument("action", choices=[action] if action else list(actions))
            fields = _fields(actions[action]) if action else {}
            positionals = [name for name in fields if name in _OF_ACTIONS and fields[name].required]
        else:
            fields = _fields(actions[""])
            positionals = [name for name in _POSITIONALS.get(command, ()) if name in fields]
        if command == "completion":
            parser.add_argument("shell", choices=SHELLS)
        for name in positionals:
            _complete(parser.add_argument(name, nargs="?"), name, fields[name].type)
        if "" in actions and not positionals and fields:
            parser.add_argument("config", nargs="?")
        fields = {name: field for name, field in fields.items() if name not in positionals}
    for name, field in {**fields, **_fields(LogSettings)}.items():
        kinds = tuple(map(type, accepted_types(field.type)))
        flag = msgspec.inspect.BoolType in kinds
        _complete(
            parser.add_argument(f"--{name}", nargs="?" if flag else None, help=_help(field.type)), name, field.type
        )
    return parser


def _fields(cls: type[Config]) -> dict[str, Any]:
    kind = msgspec.inspect.type_info(cls)
    return {field.name: field for field in kind.fields} if isinstance(kind, msgspec.inspect.StructType) else {}


def _help(kind: Any) -> str:
    return (getattr(kind, "extra_json_schema", None) or {}).get("description", "").replace("%", "%%")


def _complete(argument: Any, name: str, kind: Any) -> None:
    """Set what completes an argument's value; what is not set here is completed by files."""
    allowed = list(choices(kind))
    if msgspec.inspect.BoolType in map(type, accepted_types(kind)):
        allowed += ["true", "false"]
    if name in ("hook_point", "hook_points"):
        argument.completer = _hook_points
    elif name == "model":
        argument.completer = _models
    elif allowed:
        argument.completer = _one_of(allowed)


def _one_of(allowed: list[str]) -> Callable[..., list[str]]:
    return lambda prefix, **_: _after_commas(prefix, allowed)


def _after_commas(prefix: str, values: list[str]) -> list[str]:
    """Return the values that the last item of a list may become, each after the items before it."""
    before = prefix[: prefix.rfind(",") + 1]
    return [before + value for value in values if (before + value).startswith(prefix)]


def _hook_points(prefix: str, parsed_args: Namespace, **_: Any) -> list[str]:
    """Return the hook points of the model that the command line, or its config file, names."""
    from thresher.shared.model.config_file import likely_hook_points

    model = getattr(parsed_args, "model", None)
    path = getattr(parsed_args, "config", None)
    if model is None and path is not None:
        try:
            model = read_toml(path).get("model")
        except ThresherError:
            return []
    return _after_commas(prefix, likely_hook_points(model)) if isinstance(model, str) else []


def _models(prefix: str, **options: Any) -> list[str]:
    """Return the bundled model, the models in Hugging Face's cache, and files."""
    from argcomplete.completers import FilesCompleter

    from thresher.shared.model.config_file import cached_models
    from thresher.shared.model.loading.packages import BUNDLED

    known = [name for name in [BUNDLED, *cached_models()] if name.startswith(prefix)]
    return known + list(FilesCompleter()(prefix, **options))
