"""The actions `push` and `pull` of `thresher store`, and their options."""

from __future__ import annotations

from ...core.config import action_config
from ...core.paths import user_path
from ...core.terminal.results import print_result
from ..config import PullStoreConfig, PushStoreConfig
from .pull import pull_store
from .push import push_store


def run_hub_command(arguments: list[str]) -> int:
    """Run `push FOLDER --repo USER/NAME` or `pull hf://datasets/USER/NAME FOLDER`."""
    action, rest = arguments[0], arguments[1:]
    if action == "pull":
        missing = "`thresher store pull` needs hf://datasets/USER/NAME and a folder"
        pull = action_config(PullStoreConfig, rest, ("source", "folder"), missing, "a source and a folder")
        lines = pull_store(pull.source, user_path(pull.folder))
    else:
        missing = "`thresher store push` needs the folder of a store first"
        config = action_config(PushStoreConfig, rest, ("store",), missing, "one store and options, --key value")
        lines = push_store(user_path(config.store), config.repo, config.license, config.private)
    print_result("\n".join(lines))
    return 0
