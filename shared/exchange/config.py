"""The options of the actions of `thresher sae`. Needs no PyTorch."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ..core.config import Config


class SourceConfig(Config, frozen=True):
    """Options of `info` and `verify`."""

    source: Annotated[str, Meta(description="A folder, a file, hf://USER/REPO/path@revision or a release's name.")]


class TargetConfig(SourceConfig, frozen=True):
    """Options of `pull`."""

    folder: Annotated[str, Meta(description="The folder to write, which must not be there yet.")]


class ConvertConfig(TargetConfig, frozen=True):
    """Options of `convert`."""

    format: Annotated[str, Meta(description="The format to write.")]
    approximate: Annotated[
        bool,
        Meta(description="Convert what the format cannot hold as it is, and state what is lost on rows of `store`."),
    ] = False
    store: Annotated[str | None, Meta(description="The store whose held-out rows the loss is measured on.")] = None
    rows: Annotated[int, Meta(ge=1, description="How many rows to measure on.")] = 8192


class PushSaeConfig(SourceConfig, frozen=True):
    """Options of `push`."""

    repo: Annotated[str, Meta(description="The repository, USER/NAME; it is made if there is none.")]
    evaluation: Annotated[
        str | None, Meta(description="Output of `thresher evaluate`, for the card (default: beside the SAEs).")
    ] = None
    license: Annotated[str, Meta(description="Licence of the SAEs, by its name on the Hub.")] = "mit"
    private: Annotated[bool, Meta(description="Make a private repository.")] = False
    dry_run: Annotated[bool, Meta(description="Print the model card and the files, and upload nothing.")] = False


ACTIONS: dict[str, type[Config]] = {
    "info": SourceConfig,
    "convert": ConvertConfig,
    "verify": SourceConfig,
    "push": PushSaeConfig,
    "pull": TargetConfig,
}
