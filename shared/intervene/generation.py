"""Sample continuations from a model with SAEs in it, with its own cache and in batches of unequal prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InterventionError
from ..model.loading.context_limit import context_limit
from .spliced_model import SplicedModel
from .splicer import Texts
from .texts import pad


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave out no token."""

    max_new_tokens: int = 40
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name, value, least in (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("n", self.n, 1),
            ("top_k", self.top_k, 0),
        ):
            if value < least:
                raise InterventionError(f"{name} is {value}; expected at least {least}")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise InterventionError(
                f"temperature is {self.temperature} and top_p {self.top_p}; expected at least 0, and between 0 and 1"
            )

    def options(self) -> dict[str, Any]:
        """Return the settings of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


OnTokens = Callable[[list[int]], object]
"""Called with the next token of every continuation, also of those that have ended; an error of it ends the sampling."""


@torch.no_grad()
def sample(
    lm: SplicedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, on_tokens: OnTokens | None = None
) -> list[list[int]]:
    """Return `n` continuations of each prompt, each up to the end-of-text token.

    Prompts are padded on the left. The random state of PyTorch is left as it was if there is a seed. `on_tokens` is
    called as soon as each token is there.

    Raises:
        InterventionError: prompt and new tokens are longer than the model's context.
    """
    from transformers import GenerationConfig

    longest, limit = max(map(len, prompts)) + sampling.max_new_tokens, context_limit(lm.model)
    if limit is not None and longest > limit:
        raise InterventionError(
            f"a prompt of {max(map(len, prompts))} tokens and {sampling.max_new_tokens} new ones are longer than the "
            f"model's context of {limit:,}; shorten it, or lower max_new_tokens"
        )
    ends = end_tokens(lm)
    padding = ends[0] if ends else 0
    tokens, lengths = pad([ids for ids in prompts for _ in range(sampling.n)], padding, left=True)
    width = tokens.shape[1]
    mask = (torch.arange(width) >= (width - lengths)[:, None]).long()
    splicer = lm.splicer()
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        use_cache=sampling.use_cache and not splicer.runs_twice,
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
        **sampling.options(),
    )
    texts = Texts(width - lengths, lengths, grows=True, skipped=lm.skipped)
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=sampling.seed is not None), splicer.hooked(texts):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        model: Any = lm.model
        found: Tensor = model.generate(
            tokens.to(lm.device),
            attention_mask=mask.to(lm.device),
            generation_config=config,
            streamer=_Streamer.of(on_tokens),
        )
    return [_until(row, ends) for row in found[:, width:].tolist()]


class _Streamer:
    """What transformers' `generate` tells of its tokens: first the prompts, then one token of each text at a time."""

    def __init__(self, on_tokens: OnTokens):
        self._on_tokens, self._saw_prompts = on_tokens, False

    @classmethod
    def of(cls, on_tokens: OnTokens | None) -> _Streamer | None:
        return None if on_tokens is None else cls(on_tokens)

    def put(self, tokens: Tensor) -> None:
        if self._saw_prompts:
            self._on_tokens(tokens.reshape(-1).tolist())
        self._saw_prompts = True

    def end(self) -> None:
        pass


def end_tokens(lm: SplicedModel) -> list[int]:
    """Return the tokens that end a text."""
    for holder in (lm.model.generation_config, lm.model.config, lm.tokenizer):
        end: Any = getattr(holder, "eos_token_id", None)
        if end is not None:
            return [int(token) for token in end] if isinstance(end, (list, tuple)) else [int(end)]
    return []


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    """Return a continuation without its end-of-text token and what follows it."""
    stop = next((at for at, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
