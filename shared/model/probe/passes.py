"""Run the forward passes on a few tokens in which some of a model's blocks are measured."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from .arguments import with_output
from .blocks import Blocks
from .probe import Place, ProbeEdit, Record, run_recorded
from .scales import same


class Passes:
    """A model, the blocks to measure, and the record of an unedited pass.

    In later passes, the other blocks do not run and return their outputs of the unedited pass, if this makes no
    difference to the measured blocks.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, layers: list[int]):
        self.model = model
        self.blocks = blocks
        self.layers = layers
        listed = list(blocks.modules)
        self.last = len(listed) - 1
        self._inside = [
            (f"{blocks.path}.{layer}" + (f".{path}" if path else ""), module)
            for layer in layers
            for path, module in listed[layer].named_modules()
        ]
        around = [(f"{blocks.path}.{layer}", block) for layer, block in enumerate(listed) if layer not in layers]
        outputs: dict[str, Any] = {}
        with ExitStack() as stack:
            for path, block in around:
                keep = block.register_forward_hook(lambda _, __, output, path=path: outputs.__setitem__(path, output))
                stack.callback(keep.remove)
            self.natural = self._natural([*self._inside, *around, *self.outside()])
        self._stop = listed[layers[-1] + 1] if layers and layers[-1] < self.last else None
        self._skipped = {
            block: with_output(outputs[path], self.natural.values[Place(path, "output")])
            for path, block in around
            if Place(path, "output") in self.natural.values and Place(path, "output") not in self.natural.flat
        }
        if self._skipped and not self._skipping_changes_nothing():
            self._skipped = {}

    def run(self, edits: list[ProbeEdit]) -> Record:
        """Run the model with edits; record the inputs and outputs of the measured blocks and the modules in them."""
        return run_recorded(self.model, self._inside, edits, self._stop, self._skipped)

    def run_after(self, edits: list[ProbeEdit]) -> Record:
        """Run the model with edits; record the inputs and outputs of the blocks and of the modules outside them."""
        after = [(f"{self.blocks.path}.{layer}", block) for layer, block in enumerate(self.blocks.modules) if layer]
        return run_recorded(self.model, [*after, *self.outside()], edits, self._stop, self._skipped)

    def outside(self) -> list[tuple[str, nn.Module]]:
        """Return the modules without children that are not inside the blocks."""
        return [
            (path, module)
            for path, module in self.model.named_modules()
            if not path.startswith(f"{self.blocks.path}.")
            and not self.blocks.path.startswith(path)
            and not list(module.children())
        ]

    def _natural(self, recorded: list[tuple[str, nn.Module]]) -> Record:
        """Run the model unedited, with its own hidden states if it can return them."""
        try:
            return run_recorded(self.model, recorded, output_hidden_states=True)
        except (TypeError, ValueError, NotImplementedError):
            return run_recorded(self.model, recorded)

    def _skipping_changes_nothing(self) -> bool:
        try:
            skipping = self.run([])
        except Exception:  # a block may provide something that a later block needs
            return False
        places = [place for path, _ in self._inside for place in (Place(path, "input"), Place(path, "output"))]
        natural, now = self.natural.values, skipping.values
        return all(place in now and same(now[place], natural[place]) for place in places if place in natural)
