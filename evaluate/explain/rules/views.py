"""Ways to see a row by its token and the tokens before it: the parts that rules are made of.

A view gives every row one value, or none: its token, the token before it, the first characters of its word. "Fires on
`def`" is a value of the first view. Values are numbers; a view says each in words. A view with a `reach` has several
values per row: the tokens before it within some distance.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import regex
from jaxtyping import Int64

from ...features.token_text import TokenTexts
from ..corpus import Corpus
from .surroundings import DEEPEST_INDENTATION, Surroundings, read_surroundings

REACHES = (8,)
"""How many tokens before a row count as near."""
POSITIONS = (0, 1, 4, 16, 64)
"""First rows of the ranges of positions in a document; later positions have no value."""
AFFIX = 3
"""Characters of a prefix or suffix."""


@dataclass
class View:
    """One value per row, or -1. `reach` above 0 says that a value holds also for as many rows after it."""

    name: str
    value: Int64[np.ndarray, " rows"]
    n_values: int
    describe: Callable[[int], str] = field(repr=False)
    reach: int = 0

    @cached_property
    def _order(self) -> Int64[np.ndarray, " rows"]:
        return np.argsort(self.value, kind="stable")

    @cached_property
    def _first(self) -> Int64[np.ndarray, " values_plus_1"]:
        return np.searchsorted(self.value, np.arange(self.n_values + 1), sorter=self._order)

    def rows_with(self, value: int) -> Int64[np.ndarray, " matches"]:
        """Return the rows that have a value themselves, in order; `reach` is not applied."""
        return self._order[self._first[value] : self._first[value + 1]]


def token_in_words(text: str) -> str:
    """Return a token's text as words show it: in backquotes, or named where it shows nothing."""
    if text and not text.strip():
        if set(text) == {" "}:
            return "a space" if len(text) == 1 else f"{len(text)} spaces"
        if set(text) == {"\n"}:
            return "a newline" if len(text) == 1 else f"{len(text)} newlines"
        if text[0] == "\n" and set(text[1:]) == {" "}:
            return f"a newline and {len(text) - 1} spaces"
    shown = "".join(
        c if c == " " or c.isprintable() or _joins(c) else c.encode("unicode_escape").decode() for c in text
    )
    return f"`{shown}`" if "`" not in shown else f"`` {shown} ``"


def _joins(character: str) -> bool:
    """Return whether a character that cannot be printed alone is part of a grapheme, as in many scripts and emoji."""
    return character in "\u200c\u200d"


def shape(text: str) -> str:
    """Return the kind of a token's text in words: its script or category, and its case where the script has cases."""
    word = text.strip()
    if not word:
        return "newlines" if "\n" in text else "spaces" if text else ""
    letters = [c for c in word if c.isalpha()]
    if not letters:
        if any(c.isnumeric() for c in word):
            return "numbers"
        return "brackets" if all(c in "()[]{}" for c in word) else "punctuation"
    script = unicodedata.name(letters[0], "").split(" ")[0].replace("CJK", "HAN").capitalize()
    if any(c.isdigit() for c in word):
        return f"letters and digits ({script})"
    if all(c.islower() for c in letters):
        kind = "lower-case words" if text[0].isspace() else "lower-case parts of words"
    elif all(c.isupper() for c in letters):
        kind = "capital letters" if len(letters) == 1 else "words in capitals"
    elif letters[0].isupper():
        kind = "capitalised words"
    else:
        kind = "words" if not any(c.isupper() for c in letters) else "words in mixed case"
    return f"{kind} ({script})"


def _graphemes(word: str) -> list[str]:
    return regex.findall(r"\X", word)


def build_views(corpus: Corpus, texts: TokenTexts) -> list[View]:
    """Return the views of a corpus. Their values are found in all rows; which rules they make, in training rows."""
    ids, token = np.unique(corpus.tokens, return_inverse=True)
    token = token.astype(np.int64)
    alone = [texts.alone(int(number)) for number in ids]
    words = [text.strip().casefold() for text in alone]
    letters = [_graphemes(word) for word in words]
    size = corpus.context_size
    within = np.arange(corpus.n_rows) % size

    def before(value: np.ndarray, distance: int) -> np.ndarray:
        moved = np.concatenate([np.full(distance, -1, dtype=np.int64), value[:-distance]])
        return np.where(within >= distance, moved, -1)

    def by_text(name: str, of_token: Sequence[str], wording: str, distance: int = 0, quoted: bool = True) -> View:
        kinds = sorted({text for text in of_token if text})
        number = {text: i for i, text in enumerate(kinds)}
        table = np.array([number.get(text, -1) for text in of_token], dtype=np.int64)
        value = table[token]
        shown = [token_in_words(kind) if quoted else kind for kind in kinds]
        return View(
            name,
            before(value, distance) if distance else value,
            len(kinds),
            lambda i: wording.format(shown[i]),
        )

    shapes = [shape(text) for text in alone]
    prefixes = ["".join(word[:AFFIX]) if len(word) > AFFIX and word[0].isalnum() else "" for word in letters]
    suffixes = ["".join(word[-AFFIX:]) if len(word) > AFFIX and word[-1].isalnum() else "" for word in letters]
    views = [
        View("token", token, len(ids), lambda i: token_in_words(alone[i])),
        by_text("word", words, "the word {} in any case"),
        by_text("prefix", prefixes, "words that begin with {}"),
        by_text("suffix", suffixes, "words that end in {}"),
        by_text("shape", shapes, "{}", quoted=False),
        View("after", before(token, 1), len(ids), lambda i: f"the token after {token_in_words(alone[i])}"),
        by_text("after word", words, "the token after the word {} in any case", 1),
        by_text("after shape", shapes, "the token after {}", 1, quoted=False),
        View(
            "second after", before(token, 2), len(ids), lambda i: f"the second token after {token_in_words(alone[i])}"
        ),
        View("third after", before(token, 3), len(ids), lambda i: f"the third token after {token_in_words(alone[i])}"),
    ]
    views += [_after("pair", views[5], views[0], alone), _after("kind after", views[5], views[4], alone)]
    views.append(_positions(corpus))
    views.append(_lines(token, alone, within))
    views += _surroundings(read_surroundings(token, alone, size))
    views += [_near(token, alone, reach) for reach in REACHES]
    return views


def _surroundings(found: Surroundings) -> list[View]:
    words = [token_in_words(word) for word in found.words]
    opened = [token_in_words(mark) for mark in found.enclosures]
    return [
        View("spelling", found.word, len(words), lambda i: f"{words[i]} as a word or its beginning"),
        View("after spelling", found.previous_word, len(words), lambda i: f"the word after {words[i]}"),
        View(
            "inside",
            found.inside,
            len(found.enclosures),
            lambda i: f"tokens inside an open {opened[i]}",
        ),
        View(
            "indentation",
            found.indentation,
            DEEPEST_INDENTATION + 1,
            lambda i: f"lines indented by {i} spaces" if i else "lines that are not indented",
        ),
    ]


def _near(token: np.ndarray, alone: Sequence[str], reach: int) -> View:
    return View(
        f"near {reach}", token, len(alone), lambda i: f"the {reach} tokens after {token_in_words(alone[i])}", reach
    )


def _after(name: str, previous: View, here: View, alone: Sequence[str]) -> View:
    """Return the view of a value of `here` together with the token before it, for pairs that occur more than once."""
    key = np.where((previous.value >= 0) & (here.value >= 0), previous.value * here.n_values + here.value, -1)
    known, number, count = np.unique(key, return_inverse=True, return_counts=True)
    often = (count > 1) & (known >= 0)
    value = np.where(often, np.cumsum(often) - 1, -1)[number]
    kept = known[often]

    def describe(i: int) -> str:
        first, second = divmod(int(kept[i]), here.n_values)
        return f"{here.describe(second)} after {token_in_words(alone[first])}"

    return View(name, value, len(kept), describe)


def _positions(corpus: Corpus) -> View:
    """Return the view of the position in the document, in ranges."""
    position = corpus.position
    bins = np.searchsorted(POSITIONS, position, side="right") - 1
    value = np.where((position >= 0) & (bins < len(POSITIONS) - 1), bins, -1)

    def describe(i: int) -> str:
        low, high = POSITIONS[i] + 1, POSITIONS[i + 1]
        return "the first token of a document" if low == high else f"tokens {low} to {high} of a document"

    return View("position", value, len(POSITIONS) - 1, describe)


def _lines(token: np.ndarray, alone: Sequence[str], within: np.ndarray) -> View:
    """Return the view of the first token of the line that is not blank, which holds for the rest of the line."""
    ends = np.array(["\n" in text for text in alone])[token]
    blank = np.array([not text.strip() for text in alone])[token]
    row = np.arange(len(token))
    restart = (within == 0) | np.concatenate([[False], ends[:-1]])
    line_start = np.maximum.accumulate(np.where(restart, row, 0))
    next_word = np.minimum.accumulate(np.where(blank, len(token), row)[::-1])[::-1]
    first = next_word[line_start]
    begun_here = (first <= row) & (within[line_start.clip(0)] > 0)  # a line that began before the context is unknown
    value = np.where(begun_here, token[first.clip(max=len(token) - 1)], -1)
    return View("line", value, len(alone), lambda i: f"lines that begin with {token_in_words(alone[i])}")
