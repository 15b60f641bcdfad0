"""The actions `push` and `pull` of `thresher store`, and their options."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ...core.config import Config, action_config
from ...core.errors import ConfigError
from ...core.paths import user_path
from .pull import pull_store
from .push import push_store


class PushStoreConfig(Config, frozen=True):
    """Options of `push`."""

    store: Annotated[str, Meta(description="The store's folder.")]
    repo: Annotated[str, Meta(description="The data set repository, USER/NAME; it is made if there is none.")]
    license: Annotated[str, Meta(description="Licence of the activations, by its name on the Hub.")] = "other"
    private: Annotated[bool, Meta(description="Make a private repository.")] = False


def run_hub_command(arguments: list[str]) -> int:
    """Run `push FOLDER --repo USER/NAME` or `pull hf://datasets/USER/NAME FOLDER`."""
    action, rest = arguments[0], arguments[1:]
    if action == "pull":
        if len(rest) != 2:
            raise ConfigError("`thresher store pull` needs hf://datasets/USER/NAME and a folder")
        lines = pull_store(rest[0], user_path(rest[1]))
    else:
        missing = "`thresher store push` needs the folder of a store first"
        config = action_config(PushStoreConfig, rest, ("store",), missing, "one store and options, --key value")
        lines = push_store(user_path(config.store), config.repo, config.license, config.private)
    print("\n".join(lines))
    return 0
