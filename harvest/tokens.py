"""From text to batches of contexts, made ahead of the model in a thread."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..shared.errors import ConfigError, DataError, ModelError
from .config import HarvestConfig
from .documents import Document, read_documents
from .holdout import document_hash
from .packing import Context, ContextBatch, TokenizedDocument, pack, stack
from .token_checks import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BATCH_DOCUMENTS = 64
MAX_BATCH_CHARACTERS = 250_000


def bos_token_id(tokenizer: PreTrainedTokenizerBase, bos_token: str | None) -> int:
    """Return the id of the token that goes before a document: the one named, else BOS, CLS or EOS."""
    if bos_token is not None:
        found = tokenizer.get_vocab().get(bos_token)
        if found is None:
            raise ConfigError(f"bos_token '{bos_token}' is not in the tokenizer's vocabulary; name a token that is")
        return found
    for candidate in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    raise ModelError("the tokenizer has no BOS, CLS or EOS token; set bos_token to a token of its vocabulary")


def special_token_ids(tokenizer: PreTrainedTokenizerBase, bos: int) -> list[int]:
    """Return the ids of rows to mask: the BOS and the tokenizer's special tokens."""
    return sorted({bos, *tokenizer.all_special_ids})


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenizedDocument]:
    """Tokenize documents in batches; a document without tokens gets a number but is passed over.

    Special tokens that a document spells out are tokenized as the plain text they are.
    """
    number = 0
    for batch in _by_size(documents):
        encoded = _encode([_encodable(document.text) for document in batch], tokenizer)
        for document, ids in zip(batch, encoded, strict=True):
            if ids:
                yield TokenizedDocument(number, document.name, document_hash(document.text), np.array(ids, np.int32))
            number += 1


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options: dict[str, Any] = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [tokenizer(text, **options)["input_ids"] for text in texts]
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    # No offsets: a third less time than calling the tokenizer.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, n_characters = [], 0
    for document in documents:
        batch.append(document)
        n_characters += len(document.text)
        if len(batch) == MAX_BATCH_DOCUMENTS or n_characters >= MAX_BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def read_contexts(
    config: HarvestConfig, tokenizer: PreTrainedTokenizerBase, group: int, n_embeddings: int | None = None
) -> Iterator[Context]:
    """Yield the contexts of a harvest; note on stderr when the text is too short for all of them."""
    n_wanted, n_packed = config.n_contexts, 0
    documents = check_tokens(tokenize(read_documents(config), tokenizer), tokenizer, n_embeddings)
    first = next(documents, None)
    if first is None:
        raise DataError(f"no text in '{config.dataset}'; every document is empty, or there is none")
    for context in pack(
        chain([first], documents),
        context_size=config.context_size,
        bos=bos_token_id(tokenizer, config.bos_token),
        holdout_fraction=config.holdout_fraction,
        n_contexts=n_wanted,
        group=group,
        bos_every_context=config.bos_every_context,
    ):
        n_packed += 1
        yield context
    if n_packed < n_wanted:
        print(
            f"note: '{config.dataset}' has text for {n_packed * config.context_size:,} of the "
            f"{n_wanted * config.context_size:,} tokens asked for; the store holds those",
            file=sys.stderr,
        )


def batch_contexts(
    contexts: Iterator[Context],
    batch_size: int,
    first_batch: int = 0,
    wanted: Callable[[int, int], object] | None = None,
) -> Iterator[ContextBatch]:
    """Yield batches from number `first_batch` on, without stacking those before it, or that are not wanted.

    The batches are always the same ones, since a forward pass may round differently in other
    company: a resumed harvest runs whole batches again and drops the rows it has. `wanted` is asked
    with the numbers of a batch's first context and of the one after its last.
    """
    first = first_batch * batch_size
    for _ in islice(contexts, first):
        pass
    while batch := list(islice(contexts, batch_size)):
        if wanted is None or wanted(first, first + len(batch)):
            yield stack(batch, first)
        first += len(batch)
