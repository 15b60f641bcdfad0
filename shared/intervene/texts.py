"""Prompts as tokens: a batch of texts or token ids, padded, with the token that begins a text in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ..core.errors import InterventionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Int64[Tensor, "batch context"]
"""A text, several, or the token ids of one or several."""


def first_token(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Return the token that begins every text, as a harvest has it: BOS, else CLS, else EOS."""
    candidates = ("bos_token_id", "cls_token_id", "eos_token_id")
    found = (getattr(tokenizer, name, None) for name in candidates)
    return next((token for token in found if isinstance(token, int)), None)


def token_lists(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None, first: int | None, limit: int | None
) -> list[list[int]]:
    """Return the token ids of each prompt; texts begin with the token `first`, ids are taken as they are.

    Raises:
        InterventionError: there is no text, one is empty or longer than `limit`, or there is no tokenizer.
    """
    lists = [_tokens_of(prompt, tokenizer, first) for prompt in _each(prompts)]
    if not lists or not all(lists):
        raise InterventionError("a prompt is empty; expected at least one token")
    longest = max(map(len, lists))
    if limit is not None and longest > limit:
        raise InterventionError(
            f"a text of {longest:,} tokens is longer than the model's context of {limit:,}; shorten it"
        )
    return lists


def _each(prompts: Prompts) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _tokens_of(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, first: int | None) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise InterventionError("the model was opened without a tokenizer; give token ids instead of text")
    ids: Any = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return [*([first] if first is not None and ids[:1] != [first] else []), *map(int, ids)]


def pad(
    lists: Sequence[Sequence[int]], token: int, left: bool = False
) -> tuple[Int64[Tensor, "batch context"], Int64[Tensor, " batch"]]:
    """Return token lists as one tensor, padded on the right or on the left, and their lengths."""
    width = max(map(len, lists))
    rows = []
    for ids in lists:
        padding = [token] * (width - len(ids))
        rows.append([*padding, *ids] if left else [*ids, *padding])
    return torch.tensor(rows, dtype=torch.long), torch.tensor([len(ids) for ids in lists])


def one_token(text_or_id: str | int, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the token that a text is, or an id as it is.

    Raises:
        InterventionError: the text is several tokens, or there is no tokenizer.
    """
    if isinstance(text_or_id, int):
        return text_or_id
    ids = _tokens_of(text_or_id, tokenizer, None)
    if len(ids) != 1:
        raise InterventionError(f"'{text_or_id}' is {len(ids)} tokens; expected one token, or its id")
    return ids[0]
