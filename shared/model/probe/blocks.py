"""Find the list of the text model's blocks among the model's lists of modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Blocks(NamedTuple):
    """A model's list of blocks and its path in the model."""

    path: str
    modules: nn.ModuleList


def text_config(model: nn.Module) -> Any:
    """Return the part of a model's configuration that describes its text model, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module) -> Blocks | None:
    """Return the model's most likely list of blocks, or None if it has no list of modules.

    This is the first list in the text decoder with as many modules as the configuration has layers, else such a list
    anywhere, else the longest list, with those in the text decoder first.
    """
    return next(block_lists(model), None)


def block_lists(model: nn.Module) -> Iterator[Blocks]:
    """Yield the lists that may be the model's blocks, the most likely first."""
    n_layers = getattr(text_config(model), "num_hidden_layers", None)
    decoder = _decoder(model)
    inside = {module for module in decoder.modules()} if decoder is not None else set()
    lists = [Blocks(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [found for found in lists if len(found.modules)]

    def rank(found: Blocks) -> tuple[bool, bool, int]:
        fits = len(found.modules) == n_layers
        return not fits, found.modules not in inside, 0 if fits else -len(found.modules)

    yield from sorted(lists, key=rank)


def _decoder(model: nn.Module) -> nn.Module | None:
    """Return the module that reads text, if the model has `get_decoder`; else None."""
    get = getattr(model, "get_decoder", None)
    try:
        found = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
