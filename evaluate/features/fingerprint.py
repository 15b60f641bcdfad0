"""Digests of everything that a feature index depends on. An index or progress file with another digest is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...shared.sae import Sae
from ...shared.store import ActivationStore
from ..saes.digests import digest_of, sae_digest, tokenizer_digest
from .readout import Readout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 3
"""Increased whenever the same SAE, store, model and settings give a different index."""


def context_fingerprint(
    store: ActivationStore, readout: Readout | str | None, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """Return a digest of what all SAEs' indexes depend on: the store, the model's readout and the tokenizer."""
    facts = [_VERSION, store.n_rows, store.context_size, store.manifest.checksum, tokenizer_digest(tokenizer)]
    facts += [] if store.used_roles is None else [store.used_roles]
    if not isinstance(readout, Readout):
        return digest_of([*facts, readout])
    modules = [value for step in readout.path for value in step.module.state_dict().values()]
    return digest_of([*facts, readout.describe()], [readout.weight, *modules])


def fingerprint(context: str, sae: Sae, described: list[Any]) -> str:
    """Return a digest of every weight of an SAE, the facts in `described` and the context's digest."""
    return digest_of([context, described, sae_digest(sae)])
