"""The features that are kept beside a synthetic store."""

from __future__ import annotations

from ...shared.core.errors import StoreError
from ...shared.store import ActivationStore
from ...shared.synthetic.truth import TRUTH_FILE, Truth, read_truth, truth_digest


def read_store_truth(store: ActivationStore) -> Truth | None:
    """Return the features of a synthetic store, or None for another store.

    Raises `StoreError` if their file is missing or is not the one that the store was written with.
    """
    law, digest = store.metadata.get("law"), store.metadata.get("truth_digest")
    if law is None or digest is None:
        return None
    content = store.files.content(TRUTH_FILE)
    if content is None:
        raise StoreError(f"the store '{store.path}' is damaged: '{TRUTH_FILE}' is missing; harvest it again")
    if truth_digest(content) != digest:
        raise StoreError(f"the store '{store.path}' is damaged: '{TRUTH_FILE}' does not have its digest")
    return read_truth(law, content)
