"""Read the text of a harvest, pack it into contexts, and batch them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from ...shared.core.errors import DataError
from ..config import HarvestConfig
from ..documents.documents import read_documents
from .encode import TokenizeBatches, tokenize
from .holdout import describe_schedule
from .packing import Context, ContextBatch, pack, stack
from .text_rules import TextRules, most_frequent_special, text_rules
from .token_checks import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

LOOK_AT_DOCUMENTS = 32
_LOOK_AT_CHARACTERS = 1 << 20


def find_text_rules(config: HarvestConfig, tokenizer: PreTrainedTokenizerBase) -> TextRules:
    """Return the rules for a harvest's documents; print a note if they contain special tokens as plain text."""
    first, n_characters = [], 0
    for document in read_documents(config):
        if document.messages != []:
            first.append(document)
            n_characters += len(document.text)
        if len(first) == LOOK_AT_DOCUMENTS or n_characters > _LOOK_AT_CHARACTERS:
            break
    rules = text_rules(config, tokenizer, first[0] if first else None)
    if rules.kind == "text" and not rules.keeps_special_tokens:
        token, n = most_frequent_special(first, tokenizer)
        if n > len(first) / 2:
            _log.info(
                f"note: {n} of the first {len(first)} documents spell out the special token '{token}'; it is "
                'tokenized as plain text: set special_tokens = "tokens" to keep special tokens'
            )
    return rules


def check_splits(
    config: HarvestConfig,
    tokenizer: PreTrainedTokenizerBase,
    group: int,
    rules: TextRules,
    n_embeddings: int | None = None,
) -> None:
    """Pack until both splits have a context; raise `DataError` if one of them gets none.

    This packs a small part of the text, unless documents are few or held-out text is rare. Otherwise a harvest would
    only find out after running the model over all of it.
    """
    splits: set[bool] = set()
    contexts = _pack(config, tokenizer, group, rules, n_embeddings)
    while len(splits) < (2 if config.holdout_fraction else 1) and (context := next(contexts, None)) is not None:
        splits.add(context.held_out)
    if config.holdout == "contexts" and config.holdout_fraction:
        _log.info(f"note: {describe_schedule(config.holdout_fraction)}")


def read_contexts(
    config: HarvestConfig,
    tokenizer: PreTrainedTokenizerBase,
    group: int,
    rules: TextRules,
    n_embeddings: int | None = None,
    tokenize_batches: TokenizeBatches | None = None,
) -> Iterator[Context]:
    """Yield the contexts of a harvest; print a note if the text is too short for all of them.

    `tokenize_batches` tokenizes its batches of documents (default: one after another, in this process).
    """
    n_wanted, n_packed = config.n_contexts, 0
    for context in _pack(config, tokenizer, group, rules, n_embeddings, tokenize_batches, report=True):
        n_packed += 1
        yield context
    if n_packed < n_wanted:
        _log.info(
            f"note: '{config.dataset}' has text for {n_packed * config.context_size:,} of the "
            f"{n_wanted * config.context_size:,} tokens requested; the store holds those"
        )


def _pack(
    config: HarvestConfig,
    tokenizer: PreTrainedTokenizerBase,
    group: int,
    rules: TextRules,
    n_embeddings: int | None,
    tokenize_batches: TokenizeBatches | None = None,
    report: bool = False,
) -> Iterator[Context]:
    refused: list[str] | None = [] if config.on_bad_document == "skip" else None
    tokenized = tokenize(read_documents(config, report=report), tokenizer, rules, refused, tokenize_batches)
    documents = check_tokens(tokenized, tokenizer, n_embeddings)
    first = next(documents, None)
    if first is None:
        raise DataError(f"no text in '{config.dataset}'; every document is empty, or there is none")
    for context in pack(
        chain([first], documents),
        context_size=config.context_size,
        bos=rules.bos,
        holdout_fraction=config.holdout_fraction,
        n_contexts=config.n_contexts,
        group=group,
        bos_every_context=config.bos_every_context,
        holdout=config.holdout,
    ):
        yield context if rules.keeps_roles else context._replace(roles=None)
    if refused and report:
        _log.info(f"note: skipped {len(refused):,} document{'s' * (len(refused) > 1)}, first: {refused[0]}")


def batch_contexts(
    contexts: Iterator[Context],
    batch_size: int,
    first_batch: int = 0,
    wanted: Callable[[int, int], object] | None = None,
) -> Iterator[ContextBatch]:
    """Yield batches from number `first_batch` on, without stacking those before it, or that are not wanted.

    The batches always contain the same contexts, because a row of a forward pass may round differently in another
    batch: a resumed harvest runs whole batches again and drops the rows that are already stored. `wanted` is called
    with the number of a batch's first context and of the one after its last.
    """
    first = first_batch * batch_size
    for _ in islice(contexts, first):
        pass
    while batch := list(islice(contexts, batch_size)):
        if wanted is None or wanted(first, first + len(batch)):
            yield stack(batch, first)
        first += len(batch)
