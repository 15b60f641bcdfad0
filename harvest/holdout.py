"""Which documents are held out: a pure function of the document's own text."""

from __future__ import annotations

import hashlib


def document_hash(text: str) -> int:
    """Return the 64-bit BLAKE2b hash of a document's UTF-8 bytes.

    Lone surrogates, which some text sources carry, are hashed as they are.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def is_held_out(document: int, fraction: float) -> bool:
    """Tell whether a document, by its hash, is among the held-out `fraction`.

    The sets are nested: what is held out at 1% is also held out at 5%, so a model whose own
    held-out documents were chosen at the smaller fraction never saw any of them.
    """
    return document < fraction * 2**64
