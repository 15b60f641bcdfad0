"""Digests of everything that results depend on, so that results of other weights, settings or data are not reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...shared.sae import Sae


def digest_of(facts: Any, tensors: Iterable[Tensor] = ()) -> str:
    """Return a digest of plain values and of every byte of some tensors."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(facts, default=str, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()


def sae_digest(sae: Sae) -> str:
    """Return a digest of an SAE's weights and of the other facts that its latents and reconstructions depend on."""
    named = sorted(sae.named_parameters())
    facts = [sae.architecture, sae.config, sae.apply_b_dec_to_input, [name for name, _ in named]]
    return digest_of(facts, (value for _, value in named))


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return a digest of a tokenizer: its name, its vocabulary and, for a fast tokenizer, its full description."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = None if backend is None else backend.to_str()
    return digest_of([tokenizer.name_or_path, vocabulary(tokenizer), described])


def vocabulary(tokenizer: Any) -> dict[str, int] | None:
    """Return the tokens of a tokenizer and their ids, or None if it does not list them."""
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
