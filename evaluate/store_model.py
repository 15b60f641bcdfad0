"""The model that the SAEs are spliced into: the one that the store was harvested from, or another that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..shared.errors import ModelError, StoreError
from ..shared.hook_points import ResolvedHookPoint
from ..shared.language_model import is_encoder, load_model, load_tokenizer, resolve_hook_points
from ..shared.store import ActivationStore
from .config import EvaluateConfig
from .places import places
from .sae_folders import EvaluatedSae


def model_name(config: EvaluateConfig, store: ActivationStore) -> str | None:
    """Return the model to splice into: the one asked for, else the store's own if its tokens are stored."""
    if config.model is False or config.model == "none":
        return None
    if isinstance(config.model, str):
        return config.model
    named = store.metadata.get("model")
    return str(named) if named and store.has_tokens else None


def harvested_revision(store: ActivationStore) -> str | None:
    """Return the branch, tag or commit of the model that the store was harvested from, where one was asked for."""
    harvest = store.metadata.get("harvest")
    return harvest.get("revision") if isinstance(harvest, dict) else None


def open_model(config: EvaluateConfig, store: ActivationStore, device: str) -> PreTrainedModel | None:
    """Load the model, of the revision harvested if it is the store's own; None where there is to be none.

    Raises:
        StoreError: the store holds no tokens for a model to read.
        ModelError: the model cannot be loaded, or predicts no next token.
    """
    name = model_name(config, store)
    if name is None:
        return None
    if not store.has_tokens:
        raise StoreError(f"store '{store.path}' holds no tokens, which the model needs; set model = false")
    dtype = config.model_dtype or str(store.metadata.get("model_dtype") or "auto")
    revision = harvested_revision(store) if name == store.metadata.get("model") else None
    model = load_model(name, dtype, device, revision)
    if is_encoder(model.config):
        raise ModelError(f"{type(model).__name__} predicts no next token: it has no CE loss score; set model = false")
    return model


def splice_points(
    model: PreTrainedModel, saes: Sequence[EvaluatedSae], store: ActivationStore
) -> dict[str, ResolvedHookPoint]:
    """Find the hook points that the SAEs read and reconstruct in the model.

    Raises:
        HookPointError: the model lacks one.
        ModelError: the model is of another width than the store there.
    """
    named = {part for sae in saes for place in (sae.hook_point, sae.target) for part in places(place)}
    found = resolve_hook_points(model, sorted(named))
    for name, hook_point in found.items():
        if hook_point.d_in != store.d_in(name):
            raise ModelError(
                f"expected a model of width {store.d_in(name)} at '{name}', as in store '{store.path}'; got "
                f"{type(model).__name__} of width {hook_point.d_in}; give the model that was harvested"
            )
    return found


def open_tokenizer(store: ActivationStore) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the stored tokens, where the store names one."""
    name = store.metadata.get("tokenizer")
    return load_tokenizer(str(name), harvested_revision(store)) if name else None
