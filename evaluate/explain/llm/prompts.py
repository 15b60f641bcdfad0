"""The prompts. They hold for any script: texts are shown as JSON strings, cut between graphemes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from .request import ChatRequest

Pieces = Sequence[str]
"""The text of each token of a context."""
MARKS = (("<<", ">>"), ("⟦", "⟧"), ("⦗⦗", "⦘⦘"))
"""Marks of highlights; the first that no shown text contains are used."""

_TASK = (
    "You study one latent of a sparse autoencoder, a number that a language model computes for each token of a text. "
    "Texts are given as JSON strings, in any language. "
)
_ANSWER = "Answer with one JSON object and nothing else: "
EXPLAIN = (
    _TASK
    + "You are shown texts, from those that activate the latent weakly to those that activate it strongly. Tokens "
    "on which it is active are between {0} and {1}; after each text the activation of these tokens follows, from 1 to "
    "10. Say in one short sentence what these tokens, or the text before them, have in common. Be as specific as the "
    "texts allow, and do not mention the marks or this task. " + _ANSWER + '{{"explanation": "..."}}'
)
DETECT = (
    _TASK + "You are given an explanation of when the latent is active, and {0} numbered texts. Say for each text "
    "whether the latent is active on any of its tokens, if the explanation is right. "
    + _ANSWER
    + '{{"answers": [...]}}, with {0} numbers in order, 1 for active and 0 for not.'
)
FUZZ = (
    _TASK + "You are given an explanation of when the latent is active, and {0} numbered texts in which tokens are "
    "between {1} and {2}. Say for each text whether the explanation fits the marked tokens. "
    + _ANSWER
    + '{{"answers": [...]}}, with {0} numbers in order, 1 if it fits and 0 if not.'
)
SIMULATE = (
    _TASK
    + "You are given an explanation of when the latent is active, and the tokens of one text in order. Predict the "
    "activation on each token: 0 if the latent is not active, up to 10 if it is as active as it can be. Most are 0. "
    + _ANSWER
    + '{{"answers": [...]}}, with {0} numbers in order, one per token.'
)
INTRUDE = (
    _TASK
    + "You are given {0} numbered texts in which tokens are between {1} and {2}. In all but one the marked tokens "
    "activate the latent; in one, the intruder, they were marked at random. Find the one whose marked tokens have the "
    "least in common with the others. " + _ANSWER + '{{"intruder": N}}, with the number of the text.'
)
PROMPTS = hashlib.sha256("\0".join((EXPLAIN, DETECT, FUZZ, SIMULATE, INTRUDE)).encode()).hexdigest()[:16]
"""Hash of all prompts: explanations and scores of other prompts are not compared with these."""


def ask_explanation(texts: Sequence[Pieces], active: Sequence[dict[int, int]], max_tokens: int) -> ChatRequest:
    """Ask for an explanation. `active` holds, per text, the activation (1 to 10) of its active tokens by place."""
    marks = _marks(texts)
    lines = []
    for number, (pieces, values) in enumerate(zip(texts, active, strict=True), 1):
        shown = ", ".join(f"{_quote(pieces[place])}: {value}" for place, value in sorted(values.items()))
        lines.append(f"{number}. {_quote(_marked(pieces, values, marks))}\n   {shown}")
    return ChatRequest("explain", EXPLAIN.format(*marks), "\n".join(lines), max_tokens)


def detect(explanation: str, texts: Sequence[Pieces], max_tokens: int) -> ChatRequest:
    """Ask in which texts the latent is active."""
    user = _explained(explanation) + _numbered(["".join(pieces) for pieces in texts])
    return ChatRequest("detection", DETECT.format(len(texts)), user, max_tokens)


def fuzz(explanation: str, texts: Sequence[Pieces], marked: Sequence[Sequence[int]], max_tokens: int) -> ChatRequest:
    """Ask in which texts the explanation fits the marked tokens."""
    marks = _marks(texts)
    shown = [_marked(pieces, places, marks) for pieces, places in zip(texts, marked, strict=True)]
    return ChatRequest(
        "fuzzing", FUZZ.format(len(texts), *marks), _explained(explanation) + _numbered(shown), max_tokens
    )


def simulate(explanation: str, pieces: Pieces, max_tokens: int) -> ChatRequest:
    """Ask for the activation of each token."""
    lines = "\n".join(f"{number}. {_quote(piece)}" for number, piece in enumerate(pieces, 1))
    return ChatRequest("simulation", SIMULATE.format(len(pieces)), _explained(explanation) + lines, max_tokens)


def intrude(texts: Sequence[Pieces], marked: Sequence[Sequence[int]], max_tokens: int) -> ChatRequest:
    """Ask which text is the intruder."""
    marks = _marks(texts)
    shown = [_marked(pieces, places, marks) for pieces, places in zip(texts, marked, strict=True)]
    return ChatRequest("intruder", INTRUDE.format(len(texts), *marks), _numbered(shown), max_tokens)


def _explained(explanation: str) -> str:
    return f"Explanation: {explanation}\n\n"


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {_quote(text)}" for number, text in enumerate(texts, 1))


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _marks(texts: Sequence[Pieces]) -> tuple[str, str]:
    whole = "\0".join("".join(pieces) for pieces in texts)
    return next((marks for marks in MARKS if not any(mark in whole for mark in marks)), MARKS[-1])


def _marked(pieces: Pieces, places: Sequence[int] | dict[int, int], marks: tuple[str, str]) -> str:
    """Return a text with marks around runs of marked tokens. A token without text, part of a grapheme, has no marks."""
    text, inside, chosen = "", False, set(places)
    for place, piece in enumerate(pieces):
        if not piece:
            continue
        if (place in chosen) != inside:
            text += marks[0] if not inside else marks[1]
            inside = not inside
        text += piece
    return text + (marks[1] if inside else "")
