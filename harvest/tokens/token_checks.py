"""Check tokens before they reach the model: the tokenizer must know the text, and the model the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from ...shared.core.errors import DataError
from .packing import TokenizedDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_TOKENS = 4096
MAX_UNKNOWN = 0.2


def check_tokens(
    documents: Iterable[TokenizedDocument], tokenizer: PreTrainedTokenizerBase, n_embeddings: int | None = None
) -> Iterator[TokenizedDocument]:
    """Yield the documents, the first of them only after a check of a few thousand tokens.

    Raises `DataError` if more than a fifth of the first few thousand tokens are the tokenizer's unknown token, and
    at the first document with a token that the model has no embedding for.
    """
    documents = (_with_embeddings(document, tokenizer, n_embeddings) for document in documents)
    first, n_tokens, n_unknown = [], 0, 0
    unknown = tokenizer.unk_token_id
    for document in documents:
        first.append(document)
        n_tokens += len(document.tokens)
        n_unknown += int((document.tokens == unknown).sum())
        if n_tokens >= SAMPLE_TOKENS:
            break
    if n_unknown > MAX_UNKNOWN * n_tokens:
        raise DataError(
            f"the tokenizer '{tokenizer.name_or_path}' does not know the text: {n_unknown / n_tokens:.0%} of the first "
            f"{n_tokens:,} tokens are {tokenizer.unk_token} (id {unknown}), expected at most {MAX_UNKNOWN:.0%}; "
            "give the tokenizer that belongs to the model, or text in a script that it knows"
        )
    yield from chain(first, documents)


def _with_embeddings(
    document: TokenizedDocument, tokenizer: PreTrainedTokenizerBase, n_embeddings: int | None
) -> TokenizedDocument:
    """Return the document; raise `DataError` if the model has no embedding for one of its tokens."""
    largest = int(document.tokens.max(initial=0))
    if n_embeddings is not None and largest >= n_embeddings:
        raise DataError(
            f"document '{document.name}' has token {largest} ('{tokenizer.convert_ids_to_tokens(largest)}'), but the "
            f"model has embeddings for {n_embeddings:,} tokens (0 to {n_embeddings - 1}); leave out text with it"
        )
    return document
