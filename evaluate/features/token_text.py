"""The text of tokens: alone, with their spaces, and in a context, with whole characters.

A tokenizer's `decode` can do neither. For a single token it drops the leading space (SentencePiece), and a character
whose bytes are split over several tokens becomes U+FFFD in each. Therefore the bytes of each token are determined
first, and the bytes of all tokens of a context are decoded together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "a"


def token_bytes(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> dict[int, bytes]:
    """Return the UTF-8 bytes that each token adds to a text, by token id, without ids that the tokenizer lacks."""
    tokens = list(tokens)
    added = {token: str(content) for token, content in tokenizer.added_tokens_decoder.items()}
    decoders = _decoders(tokenizer)
    byte_of_letter = _bytes_of_letters() if "ByteLevel" in decoders or hasattr(tokenizer, "byte_decoder") else None
    found: dict[int, bytes] = {}
    for token in tokens:
        piece: Any = added.get(token)
        if piece is not None:
            found[token] = piece.encode("utf-8", "surrogatepass")
            continue
        piece = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
        if piece is None:
            continue
        if isinstance(piece, bytes):
            found[token] = piece
        elif byte_of_letter is not None and all(letter in byte_of_letter for letter in piece):
            found[token] = bytes(byte_of_letter[letter] for letter in piece)
        elif (byte := _BYTE_TOKEN.fullmatch(piece)) and ("ByteFallback" in decoders or not decoders):
            found[token] = bytes([int(byte[1], 16)])
        else:
            found[token] = _after_anchor(tokenizer, piece).encode("utf-8", "surrogatepass")
    return found


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the types of decoder that a fast tokenizer contains; empty for a slow one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    return {part["type"] for part in [decoder, *(decoder.get("decoders") or ())]} if decoder else set()


def _bytes_of_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for: GPT-2's `bytes_to_unicode`, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _after_anchor(tokenizer: PreTrainedTokenizerBase, piece: str) -> str:
    """Return what a piece adds after other text. The first piece of a text may lose its space."""
    anchor = tokenizer.convert_tokens_to_string([_ANCHOR])
    text = tokenizer.convert_tokens_to_string([_ANCHOR, piece])
    return text.removeprefix(anchor) if text.startswith(anchor) else tokenizer.convert_tokens_to_string([piece])


def whole_characters(pieces: Sequence[bytes]) -> list[str]:
    """Return the text of each token of a context. A character split over several tokens belongs to the first of them.

    Tokens that only continue a character have no text. Bytes that are not valid UTF-8, such as part of a character that
    the context cuts off, are written as `\\xf0`.
    """
    texts = [""] * len(pieces)
    owners = [number for number, piece in enumerate(pieces) for _ in piece]
    at = 0
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        stray = "\udc80" <= character <= "\udcff"
        texts[owners[at]] += f"\\x{ord(character) - 0xDC00:02x}" if stray else character
        at += 1 if stray else len(character.encode())
    return texts


def is_whole(piece: bytes) -> bool:
    """Return whether a token's bytes are whole characters."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


class TokenTexts:
    """The text of some tokens.

    `vocabulary` holds the text of each token alone; `partial` the bytes of tokens that contain part of a character.
    """

    def __init__(self, vocabulary: Mapping[int, str], partial: Mapping[int, bytes]):
        self.vocabulary, self.partial = dict(vocabulary), dict(partial)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> TokenTexts:
        """Return the texts of some of a tokenizer's tokens."""
        pieces = token_bytes(tokenizer, tokens)
        partial = {token: piece for token, piece in pieces.items() if not is_whole(piece)}
        return cls({token: whole_characters([piece])[0] for token, piece in pieces.items()}, partial)

    def alone(self, token: int) -> str:
        """Return the text of a token alone, or `⟨id⟩` if it is not known."""
        return self.vocabulary.get(token, f"⟨{token}⟩")

    def in_context(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token of a context, as `whole_characters` does."""
        if not any(token in self.partial for token in tokens):
            return [self.alone(token) for token in tokens]
        return whole_characters([self.partial.get(token) or self.alone(token).encode() for token in tokens])
