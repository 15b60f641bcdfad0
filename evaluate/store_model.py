"""The model that the SAEs are spliced into: the one that the store was harvested from, or another that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def harvest_setting(store: ActivationStore, key: str) -> Any:
    """Return a setting of the harvest that wrote the store, or None where there was none."""
    harvest = store.metadata.get("harvest")
    return harvest.get(key) if isinstance(harvest, dict) else None


def chosen_adapter(config: EvaluateConfig, store: ActivationStore) -> str | None:
    """Return the adapter to merge into the model: the one asked for, else the one that the harvest was told to use.

    Raises `ModelError` for another model without a word about the adapter of the store's.
    """
    if config.adapter is False:
        return None
    if isinstance(config.adapter, str):
        return config.adapter
    harvested = harvest_setting(store, "adapter")
    if harvested is not None and isinstance(config.model, str) and config.model != store.metadata.get("model"):
        raise ModelError(
            f"store '{store.path}' was harvested with the adapter '{harvested}'; say whether '{config.model}' is to "
            "have one: adapter = PATH, or adapter = false for a model that holds it already"
        )
    return harvested


def open_model(config: EvaluateConfig, store: ActivationStore, device: str) -> PreTrainedModel | None:
    """Load the model as it was harvested, if it is the store's own; None where there is to be none.

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
    model = load_model(
        name,
        dtype,
        device,
        harvest_setting(store, "revision") if name == store.metadata.get("model") else None,
        adapter=chosen_adapter(config, store),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation or harvest_setting(store, "attn_implementation"),
    )
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


def open_tokenizer(config: EvaluateConfig, store: ActivationStore) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the stored tokens, where the store names one."""
    name = store.metadata.get("tokenizer")
    if not name:
        return None
    revision = harvest_setting(store, "revision")
    return load_tokenizer(str(name), revision, trust_remote_code=config.trust_remote_code)
