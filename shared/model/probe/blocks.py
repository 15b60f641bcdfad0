"""Find the blocks of the text model: of several lists of modules, the one that a pass over tokens runs through."""

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
    """Return the model's list of blocks by the names and sizes of its modules, or None when there is none.

    It is the first list in the text decoder with as many modules as the configuration has layers, else such a list
    anywhere, else the longest.
    """
    return next(block_lists(model), None)


def block_lists(model: nn.Module) -> Iterator[Blocks]:
    """Yield the lists that may be the model's blocks, the likeliest first."""
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
    """Return the module of a model that reads text, where the library tells it from others."""
    get = getattr(model, "get_decoder", None)
    try:
        found = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
