"""The options of the actions of `thresher store`. Needs no PyTorch."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ..core.config import Config


class StoreConfig(Config, frozen=True):
    """Options of `info` and `verify`."""

    path: Annotated[str, Meta(description="The store's folder or URL.")]


class SampleConfig(StoreConfig, frozen=True):
    """Options of `sample`."""

    contexts: Annotated[int, Meta(ge=0, description="How many contexts to print.")] = 3
    seed: Annotated[int, Meta(ge=0, description="Seed of the choice of contexts.")] = 0
    tokenizer: Annotated[str | None, Meta(description="Tokenizer to decode with (default: the store's own).")] = None


class PushStoreConfig(Config, frozen=True):
    """Options of `push`."""

    store: Annotated[str, Meta(description="The store's folder.")]
    repo: Annotated[str, Meta(description="The data set repository, USER/NAME; it is made if there is none.")]
    license: Annotated[str, Meta(description="Licence of the activations, by its name on the Hub.")] = "other"
    private: Annotated[bool, Meta(description="Make a private repository.")] = False


class PullStoreConfig(Config, frozen=True):
    """Options of `pull`."""

    source: Annotated[str, Meta(description="hf://datasets/USER/NAME@revision.")]
    folder: Annotated[str, Meta(description="The folder to write, which must not be there yet.")]
