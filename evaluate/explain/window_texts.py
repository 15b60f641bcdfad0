"""The text of windows, token by token, cut between graphemes: what a language model is shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex

from ..features.token_text import TokenTexts
from .corpus import Corpus


def whole_graphemes(pieces: Sequence[str]) -> list[str]:
    """Return the text of each token where a grapheme that spans several tokens belongs to the first of them."""
    owners = [number for number, piece in enumerate(pieces) for _ in piece]
    found, at = [""] * len(pieces), 0
    for grapheme in regex.findall(r"\X", "".join(pieces)):
        found[owners[at]] += grapheme
        at += len(grapheme)
    return found


class WindowTexts:
    """The text of a corpus's windows."""

    def __init__(self, corpus: Corpus, texts: TokenTexts):
        self.corpus, self.texts = corpus, texts
        self._context, self._pieces = -1, [""]

    def rows(self, window: int) -> np.ndarray:
        """Return the usable rows of a window."""
        rows = self.corpus.window_start[window] + np.arange(self.corpus.window)
        return rows[self.corpus.usable[rows]]

    def pieces(self, window: int) -> list[str]:
        """Return the text of each usable token of a window; a part of a grapheme that began before has none."""
        size = self.corpus.context_size
        rows = self.rows(window)
        context = int(rows[0]) // size
        if context != self._context:
            here = np.arange(context * size, (context + 1) * size)
            usable = self.corpus.usable[here]
            pieces = [""] * size
            tokens = self.corpus.tokens[here][usable].tolist()
            for place, piece in zip(
                np.flatnonzero(usable), whole_graphemes(self.texts.in_context(tokens)), strict=True
            ):
                pieces[place] = piece
            self._context, self._pieces = context, pieces
        return [self._pieces[row - context * size] for row in rows.tolist()]

    def places(self, window: int, rows: np.ndarray) -> list[int]:
        """Return the places of rows among the usable tokens of their window."""
        return np.searchsorted(self.rows(window), rows).tolist()
