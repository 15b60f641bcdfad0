"""Rules for turning documents into rows: the BOS, which rows are masked, and whether roles are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...shared.core.errors import ConfigError, DataError, ModelError
from ..config import HarvestConfig
from ..documents.documents import Document
from .chat import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOOK_AT_CHARACTERS = 50_000
_BRACKETS = re.compile(r"[<\[{(|].*[>\]})|]", re.DOTALL)


@dataclass(frozen=True)
class TextRules:
    """The rules for all documents of a harvest."""

    kind: str
    """What every document holds: "text", "messages" or "token ids"."""
    bos: int
    mask_token_ids: list[int]
    """Token ids whose rows are always masked."""
    keeps_roles: bool
    """Whether the store keeps roles, so that the tokens that packing adds are masked by role."""
    keeps_special_tokens: bool
    """Whether a document's special tokens are kept as single tokens."""
    marker_ids: tuple[int, ...] = ()
    """Token ids that have the marker role in plain text."""
    chat: ChatTemplate | None = None


PLAIN_TEXT = TextRules("text", 0, [], keeps_roles=False, keeps_special_tokens=False)


def text_rules(config: HarvestConfig, tokenizer: PreTrainedTokenizerBase, first: Document | None) -> TextRules:
    """Return the rules for documents like the first one.

    Raises:
        ConfigError: `bos_token` is not in the vocabulary, or a chat template is given for text without messages.
        ModelError: the tokenizer has no token to begin documents with, or no template for messages.
        DataError: there is no document.
    """
    if first is None:
        raise DataError(f"no text in '{config.dataset}'; every document is empty, or there is none")
    bos = bos_token_id(tokenizer, config.bos_token)
    kind = first.kind
    chat = ChatTemplate(tokenizer, config.chat_template) if kind == "messages" else None
    if config.chat_template is not None and chat is None:
        raise ConfigError(
            f"chat_template is for a column of messages, '{config.text_column}' of '{config.dataset}' holds {kind}; "
            "leave it out, or set text_column"
        )
    markers = chat is not None or config.special_tokens == "tokens"
    special = all_special_ids(tokenizer) - ordinary_ids(tokenizer)
    if markers:
        # Special tokens are markers, whose rows may be used; unknown text is not one of them.
        unknown = getattr(tokenizer, "unk_token_id", None)
        others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
        masked = {unknown} if isinstance(unknown, int) and unknown not in others | {bos} else set()
    else:
        masked = {*tokenizer.all_special_ids, bos} & special
    return TextRules(
        kind,
        bos,
        sorted(masked),
        keeps_roles=bos not in masked,
        keeps_special_tokens=markers or kind == "token ids",
        marker_ids=tuple(sorted(special)) if markers and chat is None else (),
        chat=chat,
    )


def bos_token_id(tokenizer: PreTrainedTokenizerBase, bos_token: str | None) -> int:
    """Return the id of the token before each document: the one named, else BOS, CLS or EOS."""
    if bos_token is not None:
        found = tokenizer.get_vocab().get(bos_token)
        if found is None:
            raise ConfigError(f"bos_token '{bos_token}' is not in the tokenizer's vocabulary; name a token that is")
        return found
    for candidate in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    raise ModelError("the tokenizer has no BOS, CLS or EOS token; set bos_token to a token of its vocabulary")


def all_special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokenizer's special ids, including added tokens that are marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special ids that ordinary text produces too, such as a newline or "!" used as BOS or padding.

    A token in brackets, such as </s>, counts as special even if the tokenizer gives it for the same text.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    found = set()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    for number in all_special_ids(tokenizer):
        token = backend.id_to_token(number)
        if token is None or _BRACKETS.search(token):
            continue
        texts = {token, backend.decoder.decode([token]) if backend.decoder else token}
        if any(backend.encode(text, add_special_tokens=False).ids == [number] for text in texts):
            found.add(number)
    backend.encode_special_tokens = before
    return found


def most_frequent_special(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the special token that occurs in the text of most documents, and in how many."""
    special = tokenizer.convert_ids_to_tokens(sorted(all_special_ids(tokenizer)))
    texts = [document.text[:_LOOK_AT_CHARACTERS] for document in documents]
    counts = {token: sum(token in text for text in texts) for token in special}
    return max(counts.items(), key=lambda item: item[1], default=("", 0))
