"""Load what a harvest needs and check that its parts fit each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shared.core.device import choose_device, make_current
from ..shared.core.errors import ConfigError, ModelError
from ..shared.model.adapters import model_parts
from ..shared.model.certificate import certificate
from ..shared.model.context_limit import context_limit
from ..shared.model.hook_points import ResolvedHookPoint
from ..shared.model.language_model import load_model, load_tokenizer, resolve_hook_points
from ..shared.store.format.layout import ITEM_BYTES, choose_chunk_rows
from ..shared.store.format.roles import ROLE_NAMES
from ..shared.store.read.stored_tokenizer import serialise_tokenizer
from ..shared.store.read.tokenizer_folder import describe_tokenizer
from .config import HarvestConfig
from .tokens.text_rules import PLAIN_TEXT, TextRules, bos_token_id
from .tokens.tokens import check_splits, find_text_rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MAX_VOCABULARY = 1.1
"""Largest vocabulary of a tokenizer, without its added tokens, over the number of embeddings."""


@dataclass(frozen=True)
class Plan:
    """The model, its tokenizer and that one's files, where to read the model, and how contexts are grouped."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hook_points: dict[str, ResolvedHookPoint]
    group: int
    rules: TextRules = PLAIN_TEXT
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)

    @property
    def n_embeddings(self) -> int:
        """Number of tokens that the model has an embedding for."""
        return embedding_count(self.model)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each hook point."""
        return {name: hook_point.d_in for name, hook_point in self.hook_points.items()}


def make_plan(config: HarvestConfig) -> Plan:
    """Load model and tokenizer and find the hook points; raise `ModelError` or `HookPointError` if they do not fit."""
    device = choose_device(config.device)
    make_current(device)
    if config.revision is not None and Path(model_parts(config.model, config.adapter).base).is_dir():
        raise ConfigError(
            f"revision '{config.revision}' is for a model on the Hugging Face hub, but '{config.model}' is a folder; "
            "leave out revision, or give the folder that holds that revision"
        )
    tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    tokenizer_files = serialise_tokenizer(tokenizer)
    model = load_model(
        config.model,
        config.model_dtype,
        device,
        config.revision,
        adapter=config.adapter,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    check_fits(model, tokenizer, config)
    hook_points = resolve_hook_points(model, config.hook_points)
    widest = max(hook_point.d_in for hook_point in hook_points.values())
    row_bytes = widest * ITEM_BYTES["int8" if config.codec == "int8" else config.dtype]
    chunk_rows = choose_chunk_rows(row_bytes, config.context_size, config.chunk_bytes)
    group = max(1, chunk_rows // config.context_size)
    rules = find_text_rules(config, tokenizer)
    check_splits(config, tokenizer, group, rules, embedding_count(model))
    return Plan(model, tokenizer, hook_points, group, rules, tokenizer_files)


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: HarvestConfig) -> None:
    """Raise `ModelError` for contexts beyond the model's positions, or the tokenizer of another model.

    A tokenizer may have a few added tokens more than the model has embeddings (Gemma 3, Llama 2 with a padding token);
    only text that has one of them is refused, where it is read.
    """
    limit = context_limit(model)
    if limit is not None and config.context_size > limit:
        raise ModelError(
            f"context_size {config.context_size} is beyond the {limit} positions of '{config.model}'; lower it"
        )
    n_embeddings = embedding_count(model)
    bos = bos_token_id(tokenizer, config.bos_token)
    if bos >= n_embeddings:
        raise ModelError(
            f"the token '{tokenizer.convert_ids_to_tokens(bos)}' that begins a document has id {bos}, but "
            f"'{config.model}' has {n_embeddings} embeddings; set bos_token to a token below that"
        )
    if tokenizer.vocab_size > MAX_VOCABULARY * n_embeddings:
        raise ModelError(
            f"the tokenizer of '{config.model}' has a vocabulary of {tokenizer.vocab_size}, its model {n_embeddings} "
            "embeddings: the folder holds the tokenizer of another model; save the model's own there"
        )


def embedding_count(model: PreTrainedModel) -> int:
    """Return how many tokens the model has an embedding for, or raise `ModelError`."""
    try:
        embeddings: Any = model.get_input_embeddings()
        return embeddings.weight.shape[0]
    except (AttributeError, NotImplementedError):
        raise ModelError(f"{type(model).__name__} has no table of token embeddings; expected a model of text") from None


def metadata_of(config: HarvestConfig, identity: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return what the store says about its origin; readers rely on these keys (docs/FORMAT.md)."""
    rules = plan.rules
    adapter = model_parts(config.model, config.adapter).adapter
    told: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
    if rules.keeps_roles:
        told["roles"] = list(ROLE_NAMES)
    if rules.keeps_special_tokens:
        told["special_tokens"] = "tokens"
    if rules.chat is not None:
        told["chat_template"] = rules.chat.source
    if config.holdout != "documents":
        told["holdout"] = config.holdout
    return told | {
        "model": config.model,
        "model_class": type(plan.model).__name__,
        "model_dtype": str(plan.model.dtype).removeprefix("torch."),
        "dataset": config.dataset,
        "context_size": config.context_size,
        "tokenizer": plan.tokenizer.name_or_path,
        **describe_tokenizer(plan.tokenizer_files),
        "bos_token_id": rules.bos,
        "holdout_fraction": config.holdout_fraction,
        "seed": config.seed,
        "mask_token_ids": rules.mask_token_ids,
        "hook_modules": {name: hook_point.module_path for name, hook_point in plan.hook_points.items()},
        "certificate": certificate(plan.model, plan.hook_points),
        "harvest": identity,
    }
