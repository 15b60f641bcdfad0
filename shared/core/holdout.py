"""Which documents are held out from training: those whose hash is small."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int


def ids_hash(ids: Int[np.ndarray, " tokens"]) -> int:
    """Return the 64-bit BLAKE2b hash of a document's token ids as little-endian int32."""
    return int.from_bytes(hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest(), "big")


def number_hash(number: int) -> int:
    """Return the 64-bit BLAKE2b hash of a number, for rows of which nothing else is known."""
    return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=8).digest(), "big")


def is_held_out(document: int, fraction: float) -> bool:
    """Return whether a document, by its hash, is in the held-out `fraction`.

    The sets are nested: what is held out at 1% is also held out at 5%, so a model whose own
    held-out documents were chosen at the smaller fraction never saw any of them.
    """
    return document < fraction * 2**64
