"""Tokenize documents, and find each token's role: text, a marker, or the role of a message."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int8

from ...shared.core.errors import DataError, ModelError
from ...shared.store.format.roles import MARKER, TEXT
from ..documents.documents import Document
from .chat import ChatTemplate, check_contents, given_messages
from .holdout import document_hash, ids_hash
from .packing import TokenizedDocument
from .text_rules import TextRules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BATCH_DOCUMENTS = 4096
MAX_BATCH_CHARACTERS = 250_000


class Tokenized(NamedTuple):
    """A document's hash, tokens and roles (None if all are text), or why it cannot be tokenized."""

    hash: int
    tokens: np.ndarray
    roles: np.ndarray | None = None
    refusal: str = ""


class TokenizedBatch(NamedTuple):
    """The names of a batch's documents, and what became of each."""

    names: list[str]
    tokenized: list[Tokenized]


TokenizeBatches = Callable[
    [Callable[[list[Document]], TokenizedBatch], Iterator[list[Document]]], Iterator[TokenizedBatch]
]
"""Like `map`: calls a function with each batch of documents, and yields the results in order."""


def tokenize(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules,
    refused: list[str] | None = None,
    tokenize_batches: TokenizeBatches | None = None,
) -> Iterator[TokenizedDocument]:
    """Tokenize documents in batches; a document without tokens gets a number but is skipped.

    Special tokens that plain text spells out are tokenized as the text they are, unless `special_tokens` is "tokens".
    A leading BOS is dropped, because packing adds one. If `refused` is a list, documents that cannot be tokenized are
    skipped and their reasons appended to it.

    Raises:
        DataError: the template refuses a conversation, a token id is not in the vocabulary, or the documents are
            not all of one kind.
    """

    def tokenize_batch(batch: list[Document]) -> TokenizedBatch:
        tokenized = list(_tokenize_batch(batch, tokenizer, rules, skip=refused is not None))
        return TokenizedBatch([document.name for document in batch], tokenized)

    number = 0
    for names, batch in (tokenize_batches or map)(tokenize_batch, _of_one_kind(_by_size(documents), rules)):
        for name, (hash_, tokens, roles, refusal) in zip(names, batch, strict=True):
            if refused is not None and refusal:
                refused.append(refusal)
            if len(tokens) and tokens[0] == rules.bos and rules.keeps_special_tokens:
                tokens, roles = tokens[1:], None if roles is None else roles[1:]
            if len(tokens):
                yield TokenizedDocument(number, name, hash_, tokens, roles)
            number += 1


def _of_one_kind(batches: Iterable[list[Document]], rules: TextRules) -> Iterator[list[Document]]:
    """Yield batches; raise `DataError` for a document of another kind than the first ones."""
    for batch in batches:
        for document in batch:
            if document.messages != [] and document.kind != rules.kind:
                raise DataError(
                    f"document '{document.name}' holds {document.kind}, the documents before it {rules.kind}; give "
                    "documents of one kind"
                )
        yield batch


def _tokenize_batch(
    batch: list[Document], tokenizer: PreTrainedTokenizerBase, rules: TextRules, skip: bool
) -> Iterator[Tokenized]:
    if rules.kind != "text":
        for document in batch:
            try:
                yield _tokenize_one(document, tokenizer, rules)
            except DataError as error:
                if not skip:
                    raise DataError(f'{error}; or set on_bad_document = "skip" to skip such documents') from None
                yield Tokenized(0, np.zeros(0, np.int32), None, str(error))
    else:
        encoded = _encode([_encodable(document.text) for document in batch], tokenizer, rules.keeps_special_tokens)
        for document, ids in zip(batch, encoded, strict=True):
            tokens = np.array(ids, np.int32)
            yield Tokenized(document_hash(document.text), tokens, _special_roles(tokens, rules))


def _tokenize_one(document: Document, tokenizer: PreTrainedTokenizerBase, rules: TextRules) -> Tokenized:
    if rules.chat is not None:
        return _conversation(document, tokenizer, rules.chat)
    ids = _checked_ids(document, tokenizer)
    return Tokenized(ids_hash(ids), ids, _special_roles(ids, rules))


def _special_roles(ids: np.ndarray, rules: TextRules) -> np.ndarray | None:
    """Return the roles of plain text's tokens if special tokens are kept: markers or text."""
    if not rules.marker_ids:
        return None
    return np.where(np.isin(ids, rules.marker_ids), np.int8(MARKER), np.int8(TEXT))


def _conversation(document: Document, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate) -> Tokenized:
    messages = given_messages(document.messages or [])
    name = json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
    if not messages:
        return Tokenized(document_hash(name), np.zeros(0, np.int32))
    check_contents(messages, document.name)
    rendered = chat.render(messages, document.name)
    roles = chat.character_roles(messages, rendered, document.name)
    encoding = _with_offsets(_encodable(rendered), tokenizer)
    return Tokenized(document_hash(name), np.array(encoding.ids, np.int32), token_roles(roles, encoding.offsets))


def token_roles(roles: Int8[np.ndarray, " characters"], offsets: list[tuple[int, int]]) -> Int8[np.ndarray, " tokens"]:
    """Return the role of each token from its range of characters: a message's role if any character has one.

    Byte-level tokenizers leave white space out of the ranges, so that a token of white space has an empty range at its
    end. Such a token gets the characters since the last token.
    """
    if not offsets:
        return np.zeros(0, dtype=np.int8)
    start, stop = np.array(offsets).T
    before = np.maximum.accumulate(np.concatenate([[0], stop[:-1]]))
    start = np.where(start < stop, start, before)
    n = len(roles)
    of_message = np.where(roles != MARKER, np.arange(n), n)
    next_of_message = np.append(np.minimum.accumulate(of_message[::-1])[::-1], n)[start]
    return np.where(next_of_message < stop, np.append(roles, np.int8(MARKER))[next_of_message], np.int8(MARKER))


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, keep_special_tokens: bool) -> list[list[int]]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options: dict[str, Any] = dict(
            add_special_tokens=False, split_special_tokens=not keep_special_tokens, verbose=False
        )
        return [tokenizer(text, **options)["input_ids"] for text in texts]
    _prepare(backend, keep_special_tokens)
    # Without offsets: a third faster than calling the tokenizer.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _with_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer '{tokenizer.name_or_path}' does not give the characters of its tokens, which chat "
            "text needs; give a model with a fast tokenizer (tokenizer.json)"
        )
    _prepare(backend, keep_special_tokens=True)
    return backend.encode(text, add_special_tokens=False)


def _prepare(backend: Any, keep_special_tokens: bool) -> None:
    """Set the tokenizer options that persist between calls."""
    backend.encode_special_tokens = not keep_special_tokens
    backend.no_truncation()
    backend.no_padding()


def _checked_ids(document: Document, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return a document's token ids; raise `DataError` for an id outside the tokenizer's vocabulary."""
    ids = document.input_ids or []
    if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):  # before NumPy, which refuses what no int64 can be
        wrong = [number for number in ids if not 0 <= number < len(tokenizer)]
        raise DataError(
            f"document '{document.name}' holds token id {wrong[0]}; expected 0 to {len(tokenizer) - 1}, the vocabulary "
            f"of '{tokenizer.name_or_path}': give ids of this tokenizer"
        )
    return np.array(ids, dtype=np.int32)


def _by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, n_characters = [], 0
    for document in documents:
        batch.append(document)
        n_characters += document.n_characters + len(document.input_ids or ())
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
