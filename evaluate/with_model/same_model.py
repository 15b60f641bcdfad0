"""Check that a model is the one the store was harvested from, or at least uses the same vocabulary."""

from __future__ import annotations

import logging
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...shared.core.errors import ModelError, StoreError
from ...shared.model.content import model_content
from ...shared.model.hook_points import ResolvedHookPoint
from ...shared.model.language_model import load_tokenizer
from ...shared.model.loading.adapters import ModelParts
from ...shared.model.loading.gguf import gguf_file
from ...shared.model.loading.packages import local_model
from ...shared.store import ActivationStore
from ...shared.store.read.stored_tokenizer import load_stored_tokenizer
from ..metrics.held_out import HeldOut

_log = logging.getLogger(__name__)

CONTEXTS_AT_ONCE = 1024


def harvest_record(store: ActivationStore) -> dict[str, Any]:
    """Return the harvest settings that the store records; empty if it was not written by `thresher harvest`."""
    harvest = store.metadata.get("harvest")
    return harvest if isinstance(harvest, dict) else {}


def harvested_content(store: ActivationStore, what: str) -> str | None:
    """Return the identity that the harvest recorded for its `weights`, `adapter` or `tokenizer`, or None."""
    content = harvest_record(store).get("content")
    return content.get(what) if isinstance(content, dict) else None


def harvested_commit(store: ActivationStore) -> str | None:
    """Return the Hugging Face hub commit of the model that the store was harvested from, if it is known."""
    weights = harvested_content(store, "weights") or ""
    return weights.removeprefix("commit ") if weights.startswith("commit ") else None


def check_model_folder(name: str, store: ActivationStore, otherwise: str) -> None:
    """Raise `ModelError` if the model was a folder or a GGUF file that is no longer there.

    A model of the Hugging Face hub could have the same name.

    `otherwise` completes the error's advice: the setting with which the model is not needed.
    """
    weights = harvested_content(store, "weights") or harvest_record(store).get("weights")
    was_folder = weights is not None and harvested_commit(store) is None
    path = Path(local_model(name))
    if path.is_dir() or gguf_file(str(path)) is not None or not (was_folder or path.is_absolute()):
        return
    where = (
        ""
        if Path(name).is_absolute()
        else f" (relative to where it was harvested; here that is '{Path(name).absolute()}')"
    )
    raise ModelError(
        f"no folder or file '{name}'{where}, which store '{store.path}' names as its model; give the model's path "
        f"(--model PATH), or set {otherwise}"
    )


def check_weights(
    store: ActivationStore, model: ModelParts, revision: str | None, cache: str | None, asked_for: bool
) -> None:
    """Compare a model's weights with those that the store was harvested with.

    If they differ, print a note if the user asked for this model, and raise `ModelError` otherwise.
    """
    contents = {"weights": (model.base, revision), "adapter": (model.adapter, None)}
    for what, (name, commit) in contents.items():
        harvested = harvested_content(store, what)
        if harvested is None or name is None or harvested == f"commit {commit}":
            continue  # nothing to compare, or the same commit is loaded
        now = model_content(name, commit, cache)["weights"]
        if now is None or now == harvested:
            continue
        kind = "weights" if what == "weights" else "adapter weights"
        difference = (
            f"{kind} of '{name}' are not those that store '{store.path}' was harvested with ({harvested}; now {now})"
        )
        if not asked_for:
            raise ModelError(
                f"the {difference}; give the model that was harvested, or --model {shlex.quote(model.base)} "
                "to run this one"
            )
        _log.info(f"note: the {difference}; losses and scores are of this model")


def check_class(store: ActivationStore, name: str, model: PreTrainedModel) -> None:
    """Raise `ModelError` if the model's class is not that of the model harvested."""
    harvested = store.metadata.get("model_class")
    if harvested is not None and harvested != type(model).__name__:
        raise ModelError(
            f"expected a {harvested}, from which store '{store.path}' was harvested; got '{name}', a "
            f"{type(model).__name__}; give the model that was harvested"
        )


def check_embeddings(rows: HeldOut, name: str, model: PreTrainedModel) -> list[int]:
    """Return the stored token ids in ascending order; raise `ModelError` if the model lacks an embedding for one."""
    ids = stored_ids(rows)
    embeddings: Any = model.get_input_embeddings()
    for token in (ids[0], ids[-1]):
        if not 0 <= token < len(embeddings.weight):
            raise ModelError(
                f"store '{rows.store.path}' contains token {token}, but '{name}' has {len(embeddings.weight)} "
                "embeddings; give a model with the vocabulary of the one that was harvested"
            )
    return ids


def check_vocabulary(
    rows: HeldOut, name: str, model: PreTrainedModel, cache: str | None, trust_remote_code: bool = False
) -> None:
    """Check that the stored token ids mean the same tokens to this model as to the one harvested.

    Raises `ModelError` if it lacks an embedding for an id, or if its tokenizer assigns an id to another token.
    """
    store, ids = rows.store, check_embeddings(rows, name, model)
    now = model_content(name, None, cache)["tokenizer"]
    if now is not None and now == harvested_content(store, "tokenizer"):
        return
    tokenizer = harvested_tokenizer(store, trust_remote_code)
    if tokenizer is None or now is None:
        _log.info(f"note: the vocabulary of '{name}' could not be compared with the store's")
        return
    ours, theirs = tokens_of(tokenizer, ids), tokens_of(load_tokenizer(name, trust_remote_code=trust_remote_code), ids)
    differing = [i for i in range(len(ids)) if ours[i] != theirs[i]]
    if differing:
        first = differing[0]
        raise ModelError(
            f"the tokenizer of '{name}' is not that of store '{store.path}': {len(differing)} of {len(ids)} stored "
            f"token ids stand for other tokens, such as {ids[first]}, which is {ours[first]!r} in the store and "
            f"{theirs[first]!r} in '{name}'; give a model with the vocabulary of the one that was harvested"
        )


def harvested_tokenizer(store: ActivationStore, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer saved in the store, or else the one it names; None if neither can be loaded."""
    with suppress(StoreError, ModelError):
        if (stored := load_stored_tokenizer(store, trust_remote_code=trust_remote_code)) is not None:
            return stored
    name = store.metadata.get("tokenizer")
    with suppress(ModelError):
        if name:
            check_model_folder(str(name), store, "model = false")
            return load_tokenizer(str(name), trust_remote_code=trust_remote_code)
    return None


def stored_ids(rows: HeldOut) -> list[int]:
    """Return the token ids that occur in the held-out contexts, in ascending order."""
    found = np.zeros(0, dtype=np.int64)
    for tokens, _ in rows.token_batches(CONTEXTS_AT_ONCE):
        found = np.union1d(found, tokens.numpy().reshape(-1))
    return found.tolist()


def tokens_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str | None]:
    """Return the token of each id; None if the tokenizer has no token for it."""
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    return [vocabulary.get(number) for number in ids]


def check_hook_module(store: ActivationStore, model: PreTrainedModel, hook_point: ResolvedHookPoint) -> None:
    """Raise `StoreError` if the hook point's name meant another module or tensor when the store was harvested.

    Before harvests checked hook points by measurement, some names stood for the wrong tensor: for BLOOM, `mlp_out` was
    the residual stream.
    """
    modules = store.metadata.get("hook_modules")
    if not isinstance(modules, dict) or store.metadata.get("model_class") != type(model).__name__:
        return
    module = modules.get(hook_point.name)
    measured = isinstance(store.metadata.get("certificate"), dict)
    raw = measured or not (hook_point.derived or hook_point.clone)
    if module is None or (module == hook_point.module_path and raw):
        return
    raise StoreError(
        f"as '{hook_point.name}', store '{store.path}' contains the activation of '{module}', but in "
        f"{type(model).__name__} this name stands for {hook_point.identity}; harvest the store again"
    )
