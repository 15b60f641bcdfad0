"""Divide a source's rows into the contexts of a store, and choose those that are held out."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ...core.holdout import ids_hash, is_held_out, number_hash
from ..format.roles import PLACED, TEXT
from .source import Source


class Segment(NamedTuple):
    """Rows [start, stop) of a part."""

    part: int
    start: int
    stop: int


class ForeignContexts(NamedTuple):
    """Some contexts as the writer takes them: `[n, context, d_in]` rows and `[n, context]` of the others."""

    activations: dict[str, torch.Tensor]
    tokens: np.ndarray | None
    roles: np.ndarray | None
    held_out: list[bool]
    documents: np.ndarray | None
    positions: np.ndarray | None
    info: dict[int, tuple[int, str]]


class Contexts:
    """The contexts of a store, a pure function of the source, `context_size` and `holdout_fraction`.

    Rows with contexts keep them. Rows without order are taken in groups. Documents are packed one after another, those
    that are held out apart from the others, so that no context holds both. Rows that do not fill a last context are
    left out.
    """

    def __init__(self, source: Source, context_size: int, holdout_fraction: float) -> None:
        self._source, self.size, self._fraction = source, context_size, holdout_fraction
        shape = source.shape
        self._bounds = [0, *accumulate(shape.part_rows)]
        self._packed: list[list[Segment]] = []
        self._hashes: list[int] = []
        self._split: list[bool] = []
        if shape.documents:
            self._pack()
        else:
            n = self._bounds[-1] // context_size
            self._split = [is_held_out(number_hash(number), holdout_fraction) for number in range(n)]
        self.n_contexts = len(self._split)
        self.n_left_out = self._bounds[-1] - self.n_contexts * context_size

    @property
    def n_held_out(self) -> int:
        """The number of contexts that are held out."""
        return sum(self._split)

    def _pack(self) -> None:
        waiting: dict[bool, list[Segment]] = {False: [], True: []}
        filled = {False: 0, True: 0}
        for part, n_rows in enumerate(self._source.shape.part_rows):
            self._hashes.append(ids_hash(self._source.document(part)))
            held_out = is_held_out(self._hashes[-1], self._fraction)
            start = 0
            while start < n_rows:
                stop = min(n_rows, start + self.size - filled[held_out])
                waiting[held_out].append(Segment(part, start, stop))
                filled[held_out] += stop - start
                start = stop
                if filled[held_out] == self.size:
                    self._packed.append(waiting[held_out])
                    self._split.append(held_out)
                    waiting[held_out], filled[held_out] = [], 0

    def batch(self, first: int, stop: int) -> ForeignContexts:
        """Return contexts [first, stop)."""
        shape = self._source.shape
        segments = self._segments(first, stop)
        rows = [self._source.read(*segment) for segment in segments]
        grid = (stop - first, self.size)
        documents = positions = tokens = roles = None
        info: dict[int, tuple[int, str]] = {}
        if shape.documents:
            documents = np.concatenate([np.full(end - start, part) for part, start, end in segments]).reshape(grid)
            positions = np.concatenate([np.arange(start, end) for _, start, end in segments]).reshape(grid)
            info = {part: (self._hashes[part], shape.part_names[part]) for part, _, _ in segments}
        elif shape.one_document_each:
            documents = np.repeat(np.arange(first, stop), self.size).reshape(grid)
            positions = np.tile(np.arange(self.size), stop - first).reshape(grid)
            info = {number: (number_hash(number), str(number)) for number in range(first, stop)}
        if shape.has_tokens:
            tokens = np.concatenate([part.tokens for part in rows]).reshape(grid)  # pyright: ignore
        if shape.has_mask:
            usable = np.concatenate([part.usable for part in rows]).reshape(grid)  # pyright: ignore
            roles = np.where(usable, np.int8(TEXT), np.int8(PLACED))
        activations = {
            name: torch.cat([part.activations[name] for part in rows]).view(*grid, d_in)
            for name, d_in in shape.hook_points.items()
        }
        return ForeignContexts(activations, tokens, roles, self._split[first:stop], documents, positions, info)

    def _segments(self, first: int, stop: int) -> list[Segment]:
        """Return the rows of contexts [first, stop), those of one part in one segment if they are consecutive."""
        if self._source.shape.documents:
            return [segment for context in self._packed[first:stop] for segment in context]
        begin, end = first * self.size, stop * self.size
        segments = []
        part = bisect_right(self._bounds, begin) - 1
        while begin < end:
            upto = min(end, self._bounds[part + 1])
            if upto > begin:
                segments.append(Segment(part, begin - self._bounds[part], upto - self._bounds[part]))
            begin, part = upto, part + 1
        return segments
