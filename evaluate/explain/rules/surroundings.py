"""What a row's token is part of: its word, the word before, open brackets and quotation marks, the line's indentation.

Words, brackets and lines may span tokens, so these are found by reading each context from its start.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

CLOSES = {")": "(", "]": "[", "}": "{", "」": "「", "』": "『", "】": "【", "»": "«", "”": "“"}
OPENS = frozenset(CLOSES.values())
QUOTES = ('"', "'")
LONGEST_WORD = 40
"""Characters of a word that are followed; a longer run of letters is cut to as many."""
DEEPEST_INDENTATION = 40


class Surroundings(NamedTuple):
    """Values of each row, by number or -1, and what the numbers stand for."""

    word: Int64[np.ndarray, " rows"]
    previous_word: Int64[np.ndarray, " rows"]
    words: list[str]
    inside: Int64[np.ndarray, " rows"]
    enclosures: list[str]
    indentation: Int64[np.ndarray, " rows"]


def read_surroundings(token: Int64[np.ndarray, " rows"], alone: Sequence[str], context_size: int) -> Surroundings:
    """Return the surroundings of each row from the text of tokens up to and including its own.

    `token` holds numbers of `alone`, the tokens' texts. A word is a run of letters, digits and marks; a row's word is
    what has been read of it, in any case.
    """
    pieces = [_Piece(text) for text in alone]
    numbers: dict[str, int] = {}
    enclosures: dict[str, int] = {}
    n = len(token)
    word, previous, inside, indentation = (np.full(n, -1, dtype=np.int64) for _ in range(4))
    current, last, stack, indent = "", "", [], -1
    for row, number in enumerate(token.tolist()):
        if row % context_size == 0:
            current, last, stack, indent = "", "", [], -1
        piece = pieces[number]
        enclosing = stack[-1] if stack else ""
        if not piece.head and current:
            last, current = current, ""
        if piece.continues and current:
            current = (current + piece.head)[:LONGEST_WORD]
        elif piece.head:
            last, current = current or last, piece.head[:LONGEST_WORD]
        if current and piece.head:
            word[row] = numbers.setdefault(current, len(numbers))
        if last:
            previous[row] = numbers.setdefault(last, len(numbers))
        if not piece.ends_in_word and current:
            last, current = current, ""
        if enclosing:
            inside[row] = enclosures.setdefault(enclosing, len(enclosures))
        _enclose(stack, piece.marks)
        if piece.indentation is not None:
            indent = piece.indentation
        if indent >= 0:
            indentation[row] = min(indent, DEEPEST_INDENTATION)
    return Surroundings(word, previous, list(numbers), inside, list(enclosures), indentation)


class _Piece:
    """The text of one token, taken apart: its last run of word characters, its brackets, its line's indentation."""

    def __init__(self, text: str):
        stripped = text.rstrip()
        self.ends_in_word = bool(text) and stripped == text and _in_word(text[-1])
        start = len(stripped)
        while start and _in_word(stripped[start - 1]):
            start -= 1
        self.head = stripped[start:].casefold()
        self.continues = bool(self.head) and start == 0
        self.marks = [c for c in text if c in OPENS or c in CLOSES or c in QUOTES or c == "\n"]
        _, newline, rest = text.rpartition("\n")
        self.indentation = len(rest) - len(rest.lstrip(" ")) if newline else None


def _in_word(character: str) -> bool:
    return (
        character.isalnum()
        or character == "_"
        or (not character.isascii() and not character.isspace() and _marks(character))
    )


def _marks(character: str) -> bool:
    """Return whether a character combines with the letters before it."""
    return unicodedata.category(character).startswith("M")


def _enclose(stack: list[str], marks: Sequence[str]) -> None:
    """Open and close brackets and quotation marks; a newline closes quotation marks."""
    for mark in marks:
        if mark == "\n":
            while stack and stack[-1] in QUOTES:
                stack.pop()
        elif mark in QUOTES:
            if stack and stack[-1] == mark:
                stack.pop()
            elif not (stack and stack[-1] in QUOTES):
                stack.append(mark)
        elif mark in OPENS:
            if not (stack and stack[-1] in QUOTES):
                stack.append(mark)
        elif stack and stack[-1] == CLOSES[mark]:
            stack.pop()
