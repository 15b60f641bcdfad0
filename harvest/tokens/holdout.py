"""Choose the held-out text: documents by hash, or contexts by number."""

from __future__ import annotations

import hashlib

from ...shared.core.holdout import ids_hash as ids_hash
from ...shared.core.holdout import is_held_out as is_held_out

CYCLE = 80
"""The period of the choice of held-out contexts, not counting the contexts that are left out."""


def document_hash(text: str) -> int:
    """Return the 64-bit BLAKE2b hash of a document's UTF-8 bytes.

    Lone surrogates, which some text sources carry, are hashed as they are.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def context_split(number: int, fraction: float) -> bool | None:
    """Return whether the context with this number in the packed text is held out; None if it is left out.

    Contexts are held out in runs, and one context before and behind each run is left out, so that no held-out text
    directly continues text that is trained on, or the other way round. The result depends only on the number and
    the fraction, so that a resumed or extended harvest splits the same way.
    """
    if fraction == 0:
        return False
    n_before, n_held_out, n_after = _schedule(fraction)
    place = number % (n_before + n_held_out + n_after + 2)
    if place in (n_before, n_before + n_held_out + 1):
        return None
    return n_before < place <= n_before + n_held_out


def _schedule(fraction: float) -> tuple[int, int, int]:
    """Return how many contexts of a period are for training, held out, and for training again."""
    n_held_out = max(1, round(CYCLE * fraction))
    n_training = max(1, round(n_held_out * (1 - fraction) / fraction))
    n_before = max(1, n_training // 4)
    return n_before, n_held_out, n_training - n_before


def describe_schedule(fraction: float) -> str:
    """Return a sentence on which contexts are held out."""
    n_before, n_held_out, n_after = _schedule(fraction)
    return (
        f"holds out contexts, not documents: of every {n_before + n_held_out + n_after + 2} contexts in a row, "
        f"{n_held_out} held out and one on each side left out of the store; "
        "text that occurs twice may be in both splits"
    )
