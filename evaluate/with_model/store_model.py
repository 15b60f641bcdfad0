"""Load the model that the SAEs are spliced into: the store's model, or the one that the settings name."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...shared.core.errors import ModelError, StoreError
from ...shared.model.capture import check_splices
from ...shared.model.hook_points import ResolvedHookPoint, members
from ...shared.model.language_model import is_encoder, load_model, load_tokenizer, resolve_hook_points
from ...shared.model.loading.adapters import model_parts
from ...shared.model.loading.placement import spread_of
from ...shared.store import ActivationStore
from ...shared.store.read.stored_tokenizer import load_stored_tokenizer
from ..config import EvaluateConfig
from ..saes.sae_folders import EvaluatedSae
from .same_model import (
    check_class,
    check_hook_module,
    check_model_folder,
    check_weights,
    harvest_record,
    harvested_commit,
)


def model_name(config: EvaluateConfig, store: ActivationStore) -> str | None:
    """Return the name of the model to splice into: the configured one, else the store's if it holds tokens."""
    if config.model is False or config.model == "none":
        return None
    if isinstance(config.model, str):
        return config.model
    named = store.metadata.get("model")
    return str(named) if named and store.has_tokens else None


def is_asked_for(config: EvaluateConfig) -> bool:
    """Return whether the settings name a model."""
    return isinstance(config.model, str) and config.model != "none"


def harvested_revision(store: ActivationStore) -> str | None:
    """Return the commit of the model that the store was harvested from, or else the revision set for the harvest."""
    return harvested_commit(store) or harvest_record(store).get("revision")


def chosen_adapter(config: EvaluateConfig, store: ActivationStore) -> str | None:
    """Return the adapter to merge into the model: the configured one, else the one used in the harvest.

    Raises `ModelError` if another model is configured, the harvest used an adapter, and `adapter` is not set.
    """
    if config.adapter is False:
        return None
    if isinstance(config.adapter, str):
        return config.adapter
    harvested = harvest_record(store).get("adapter")
    if harvested is not None and isinstance(config.model, str) and config.model != store.metadata.get("model"):
        raise ModelError(
            f"store '{store.path}' was harvested with the adapter '{harvested}'; set adapter = PATH to "
            f"merge one into '{config.model}', or adapter = false if it needs none or contains it already"
        )
    return harvested


def open_model(config: EvaluateConfig, store: ActivationStore, device: str) -> PreTrainedModel | None:
    """Load the model, or return None if the evaluation runs without one.

    The store's own model is loaded as it was for the harvest.

    Raises:
        StoreError: the store contains no tokens to run the model on.
        ModelError: the model cannot be loaded, predicts no next token, or has changed since the harvest.
    """
    name = model_name(config, store)
    if name is None:
        return None
    if not store.has_tokens:
        raise StoreError(f"the model needs tokens, and store '{store.path}' contains none; set model = false")
    asked_for = is_asked_for(config)
    if not asked_for:
        check_model_folder(name, store, "model = false to evaluate without it")
    dtype = config.model_dtype or str(store.metadata.get("model_dtype") or "auto")
    revision = harvested_revision(store) if name == store.metadata.get("model") else None
    adapter = chosen_adapter(config, store)
    check_weights(store, model_parts(name, adapter), revision, config.cache, asked_for)
    model = load_model(
        name,
        dtype,
        device,
        revision,
        adapter=adapter,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation or harvest_record(store).get("attn_implementation"),
        spread=spread_of(config.device_map, config.max_memory, config.offload_folder, config.device),
    )
    if is_encoder(model.config):
        raise ModelError(
            f"{type(model).__name__} does not predict the next token, so it has no CE loss score; set model = false"
        )
    if asked_for:
        check_class(store, name, model)
    return model


def splice_points(
    model: PreTrainedModel, saes: Sequence[EvaluatedSae], store: ActivationStore
) -> dict[str, ResolvedHookPoint]:
    """Return the model's hook points that the SAEs read or reconstruct, by name.

    Raises:
        HookPointError: the model lacks one, or a reconstruction cannot be spliced in there.
        ModelError: the model's width at a hook point is not the store's.
        StoreError: the store contains another tensor of the model under this name.
    """
    named = {name for sae in saes for group in (sae.hook_point, sae.target) for name in members(group)}
    found = resolve_hook_points(model, sorted(named))
    for name, hook_point in found.items():
        if hook_point.d_in != store.d_in(name):
            raise ModelError(
                f"expected a model of width {store.d_in(name)} at '{name}', as in store '{store.path}'; got "
                f"{type(model).__name__} of width {hook_point.d_in}; give the model that was harvested"
            )
        check_hook_module(store, model, hook_point)
    for name in {name for sae in saes for name in members(sae.target)}:
        check_splices(model, found[name])
    return found


def open_tokenizer(config: EvaluateConfig, store: ActivationStore) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the stored tokens: the store's own, else the configured model's, else the one named.

    Raises:
        StoreError: the saved tokenizer is damaged, and the settings name no model.
        ModelError: the store has no saved tokenizer, and the one to use instead cannot be loaded.
    """
    try:
        stored = load_stored_tokenizer(store, trust_remote_code=config.trust_remote_code)
    except StoreError as error:
        if not is_asked_for(config):
            raise StoreError(f"{error}; give the model with its tokenizer (--model PATH)") from None
        stored = None
    if stored is not None:
        return stored
    if isinstance(config.model, str) and is_asked_for(config):
        return load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    name = store.metadata.get("tokenizer")
    if not name:
        return None
    check_model_folder(str(name), store, "feature_rows = 0 to leave out the feature index")
    return load_tokenizer(str(name), harvested_revision(store), trust_remote_code=config.trust_remote_code)
