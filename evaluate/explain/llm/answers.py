"""Read what a language model answered. An answer that does not say what was asked is bad: counted, never guessed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .request import Answer


class BadAnswerError(ValueError):
    """An answer that cannot be used; its message is the reason that is counted."""


REASONS = ("refusal", "truncated", "no JSON", "wrong JSON")


def explanation(answer: Answer) -> str:
    """Return an explanation."""
    value = _field(answer, "explanation")
    if not isinstance(value, str) or not value.strip():
        raise BadAnswerError("wrong JSON")
    return " ".join(value.split())


def yes_or_no(answer: Answer, n: int) -> list[bool]:
    """Return `n` answers of yes (1) and no (0)."""
    values = _numbers(answer, n)
    if any(value not in (0, 1) for value in values):
        raise BadAnswerError("wrong JSON")
    return [bool(value) for value in values]


def activations(answer: Answer, n: int) -> list[float]:
    """Return `n` predicted activations, from 0 to 10."""
    values = _numbers(answer, n)
    if any(not 0 <= value <= 10 for value in values):
        raise BadAnswerError("wrong JSON")
    return [float(value) for value in values]


def choice(answer: Answer, n: int) -> int:
    """Return which of `n` texts was chosen, counted from 0; the answer counts from 1."""
    value = _field(answer, "intruder")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= n:
        raise BadAnswerError("wrong JSON")
    return value - 1


def _numbers(answer: Answer, n: int) -> Sequence[float]:
    values = _field(answer, "answers")
    if not isinstance(values, list) or len(values) != n or any(not isinstance(v, (int, float)) for v in values):
        raise BadAnswerError("wrong JSON")
    return values


def _field(answer: Answer, name: str) -> Any:
    if answer.refusal:
        raise BadAnswerError("refusal")
    found = _objects(answer.text)
    holding = [value for value in found if name in value]
    if holding and all(value[name] == holding[0][name] for value in holding):
        return holding[0][name]
    if answer.finish_reason == "length":
        raise BadAnswerError("truncated")
    raise BadAnswerError("wrong JSON" if found else "no JSON")


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a text, which may have words or a fence of code around them."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
