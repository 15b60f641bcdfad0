"""First-letter probes: can a few latents tell which letter a token begins with?

The labels come from the tokenizer's vocabulary alone. They are balanced, split by documents and fitted as those of
k-sparse probing on next tokens are. That a feature is spread over several latents, or absorbed by those of particular
words, shows as a low accuracy of one latent beside a high one of sixteen (arXiv 2409.14507).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from ..features.token_text import token_bytes
from ..metrics.held_out import HeldOut
from ..with_model.probing import Task, next_token_tasks

N_LETTERS = 10
"""How many of the most frequent first letters are probed for."""


def first_letters(
    tokens: Int64[np.ndarray, "*shape"], tokenizer: PreTrainedTokenizerBase
) -> Int64[np.ndarray, "*shape"]:
    """Return which letter of the alphabet each token's text begins with, after a space; -1 for another beginning."""
    known, places = np.unique(tokens, return_inverse=True)
    content = token_bytes(tokenizer, known.tolist())
    letters = []
    for token in known.tolist():
        text = content.get(token, b"").decode("utf-8", "replace").removeprefix(" ").lower()
        letters.append(ord(text[0]) - ord("a") if text[:1].isascii() and text[:1].isalpha() else -1)
    return np.array(letters, dtype=np.int64)[places].reshape(tokens.shape)


def first_letter_tasks(rows: HeldOut, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Task]:
    """Return the balanced tasks of the most frequent first letters; `token` is the letter's place in the alphabet."""
    tokens = torch.cat([batch for batch, _ in rows.token_batches(64)]).numpy()
    letters = first_letters(tokens, tokenizer)
    return next_token_tasks(letters[rows.usable], rows.group[rows.usable], N_LETTERS, seed)
