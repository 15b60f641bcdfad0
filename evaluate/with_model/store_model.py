"""The model that the SAEs are spliced into: the one that the store was harvested from, or another that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...shared.core.errors import ModelError, StoreError
from ...shared.model.adapters import model_parts
from ...shared.model.capture import check_splices
from ...shared.model.hook_points import ResolvedHookPoint
from ...shared.model.language_model import is_encoder, load_model, load_tokenizer, resolve_hook_points
from ...shared.store import ActivationStore
from ...shared.store.read.stored_tokenizer import load_stored_tokenizer
from ..config import EvaluateConfig
from ..saes.hook_group import places
from ..saes.sae_folders import EvaluatedSae
from .same_model import check_class, check_is_here, check_place, check_weights, harvest_record, harvested_commit


def model_name(config: EvaluateConfig, store: ActivationStore) -> str | None:
    """Return the model to splice into: the one asked for, else the store's own if its tokens are stored."""
    if config.model is False or config.model == "none":
        return None
    if isinstance(config.model, str):
        return config.model
    named = store.metadata.get("model")
    return str(named) if named and store.has_tokens else None


def is_asked_for(config: EvaluateConfig) -> bool:
    """Tell whether the configuration names a model itself."""
    return isinstance(config.model, str) and config.model != "none"


def harvested_revision(store: ActivationStore) -> str | None:
    """Return the commit of the model that the store was harvested from, or else the revision that was asked for."""
    return harvested_commit(store) or harvest_record(store).get("revision")


def chosen_adapter(config: EvaluateConfig, store: ActivationStore) -> str | None:
    """Return the adapter to merge into the model: the one asked for, else the one that the harvest was told to use.

    Raises `ModelError` for another model without a word about the adapter of the store's.
    """
    if config.adapter is False:
        return None
    if isinstance(config.adapter, str):
        return config.adapter
    harvested = harvest_record(store).get("adapter")
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
        ModelError: the model cannot be loaded, predicts no next token, or is not what it was at the harvest.
    """
    name = model_name(config, store)
    if name is None:
        return None
    if not store.has_tokens:
        raise StoreError(f"store '{store.path}' holds no tokens, which the model needs; set model = false")
    asked_for = is_asked_for(config)
    if not asked_for:
        check_is_here(name, store, "model = false to evaluate without it")
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
    )
    if is_encoder(model.config):
        raise ModelError(f"{type(model).__name__} predicts no next token: it has no CE loss score; set model = false")
    if asked_for:
        check_class(store, name, model)
    return model


def splice_points(
    model: PreTrainedModel, saes: Sequence[EvaluatedSae], store: ActivationStore
) -> dict[str, ResolvedHookPoint]:
    """Find the hook points that the SAEs read and reconstruct in the model.

    Raises:
        HookPointError: the model lacks one, or no reconstruction can take its place there.
        ModelError: the model is of another width than the store there.
        StoreError: the store holds another of the model's activations under the name.
    """
    named = {part for sae in saes for place in (sae.hook_point, sae.target) for part in places(place)}
    found = resolve_hook_points(model, sorted(named))
    for name, hook_point in found.items():
        if hook_point.d_in != store.d_in(name):
            raise ModelError(
                f"expected a model of width {store.d_in(name)} at '{name}', as in store '{store.path}'; got "
                f"{type(model).__name__} of width {hook_point.d_in}; give the model that was harvested"
            )
        check_place(store, model, hook_point)
    for name in {part for sae in saes for part in places(sae.target)}:
        check_splices(model, found[name])
    return found


def open_tokenizer(config: EvaluateConfig, store: ActivationStore) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the stored tokens: the store's own, else that of the model asked for, else the one named.

    Raises:
        StoreError: the store's own is damaged, and no model is asked for.
        ModelError: the store keeps none, and the one that it names cannot be loaded.
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
    check_is_here(str(name), store, "feature_rows = 0 to leave out the feature index")
    return load_tokenizer(str(name), harvested_revision(store), trust_remote_code=config.trust_remote_code)
