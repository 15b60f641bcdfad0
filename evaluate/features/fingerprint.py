"""What a feature index depends on, as a digest: an index or progress of anything else is not gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...shared.sae import Sae
from ...shared.store import ActivationStore
from .logits import final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLED_ROWS = 64
"""Rows of a decoder or an unembedding that stand for the whole of it."""


def fingerprint(
    store: ActivationStore,
    sae: Sae,
    described: list[Any],
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    """Return a digest of the store's checksums, the SAE, the settings `described` and what gives a model's logits."""
    digest = hashlib.blake2b(digest_size=16)
    facts = [described, sae.architecture, sae.config, store.n_rows, store.context_size, store.manifest.checksum]
    facts.append(None if tokenizer is None else tokenizer.name_or_path)
    digest.update(json.dumps(facts, default=str, sort_keys=True).encode())
    for tensor in (*_of_sae(sae), *_of_model(model)):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_sae(sae: Sae) -> Iterator[Tensor]:
    step = max(1, sae.d_sae // SAMPLED_ROWS)
    yield from (sae.W_enc[:, ::step], sae.W_dec[::step])
    yield from (value for _, value in sorted(sae.named_parameters()) if value.ndim == 1)


def _of_model(model: PreTrainedModel | None) -> Iterator[Tensor]:
    unembedding = None if model is None else model.get_output_embeddings()
    if model is None or unembedding is None:
        return
    yield unembedding.weight[:: max(1, len(unembedding.weight) // SAMPLED_ROWS)]
    norm = final_norm(model)
    yield from norm.parameters() if norm is not None else ()
