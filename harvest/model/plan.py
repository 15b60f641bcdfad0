"""Load the model and tokenizer of a harvest, and check that they fit each other and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...shared.core.compute.device import choose_device, make_current
from ...shared.core.errors import ConfigError, ModelError
from ...shared.model.capture import capture
from ...shared.model.certificate import certificate
from ...shared.model.hook_points import ResolvedHookPoint
from ...shared.model.language_model import load_model, load_tokenizer, resolve_hook_points
from ...shared.model.loading.adapters import model_parts
from ...shared.model.loading.context_limit import context_limit
from ...shared.model.loading.placement import spread_of
from ...shared.model.loading.tensor_parallel import Team
from ...shared.model.probe.probe import probe_tokens
from ...shared.model.probe.scales import same
from ...shared.store.format.layout import bytes_per_value, choose_chunk_rows
from ...shared.store.format.roles import ROLE_NAMES
from ...shared.store.read.stored_tokenizer import serialise_tokenizer
from ...shared.store.read.tokenizer_folder import describe_tokenizer
from ..config import HarvestConfig
from ..tokens.text_rules import PLAIN_TEXT, TextRules, bos_token_id
from ..tokens.tokens import check_splits, find_text_rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .vllm_engine import VllmEngine


MAX_VOCABULARY = 1.1
"""Largest ratio of a tokenizer's vocabulary, without added tokens, to the number of embeddings."""


@dataclass(frozen=True)
class HarvestPlan:
    """The model, its tokenizer and the tokenizer's files, the hook points, and the contexts per group."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hook_points: dict[str, ResolvedHookPoint]
    group: int
    rules: TextRules = PLAIN_TEXT
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    team: Team | None = None
    """The processes that hold the model together with this one."""
    engine: VllmEngine | None = None
    """What runs the model in its place; `model` then has no weights."""

    @property
    def n_embeddings(self) -> int:
        """The number of tokens that have an embedding."""
        return embedding_count(self.model)

    @property
    def widths(self) -> dict[str, int]:
        """The width of each hook point."""
        return {name: hook_point.d_in for name, hook_point in self.hook_points.items()}


def make_plan(config: HarvestConfig, team: Team | None = None) -> HarvestPlan:
    """Load the model and tokenizer, find the hook points, and check that all of them fit the settings."""
    if config.engine == "vllm":
        return _plan_of_vllm(config)
    spread = spread_of(config.device_map, config.max_memory, config.offload_folder, config.device)
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
        spread=spread,
        team=team,
    )
    check_fits(model, tokenizer, config)
    hook_points = resolve_hook_points(model, config.hook_points)
    if team is not None:
        check_whole(model, hook_points, team)
    group, rules = _packing(config, model, tokenizer, hook_points)
    return HarvestPlan(model, tokenizer, hook_points, group, rules, tokenizer_files, team)


def _plan_of_vllm(config: HarvestConfig) -> HarvestPlan:
    """Check all that needs no GPU before vLLM starts."""
    from .vllm_engine import VllmEngine, describe_model, stream_points

    model = describe_model(config)
    tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    tokenizer_files = serialise_tokenizer(tokenizer)
    check_fits(model, tokenizer, config)
    hook_points, layers = stream_points(model, config.hook_points)
    group, rules = _packing(config, model, tokenizer, hook_points)
    engine = VllmEngine(config, layers, model.dtype)
    return HarvestPlan(model, tokenizer, hook_points, group, rules, tokenizer_files, engine=engine)


def _packing(
    config: HarvestConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    hook_points: Mapping[str, ResolvedHookPoint],
) -> tuple[int, TextRules]:
    """Return the contexts per group and the rules of the text, and check that both splits get a context."""
    widest = max(hook_point.d_in for hook_point in hook_points.values())
    row_bytes = widest * bytes_per_value(config.dtype, config.codec)
    chunk_rows = choose_chunk_rows(row_bytes, config.context_size, config.chunk_bytes)
    group = max(1, chunk_rows // config.context_size)
    rules = find_text_rules(config, tokenizer)
    check_splits(config, tokenizer, group, rules, embedding_count(model))
    return group, rules


def check_whole(model: PreTrainedModel, hook_points: Mapping[str, ResolvedHookPoint], team: Team) -> None:
    """Raise `ModelError` for a hook point whose activation is divided among the processes of a team.

    This is measured: each process captures the activations of the same tokens, and all must be the same.
    """
    captured = capture(model, probe_tokens(model), hook_points)
    of_all = team.gather({name: activation.float().cpu() for name, activation in captured.items()})
    for name, activation in of_all[0].items():
        if not all(same(theirs[name], activation) for theirs in of_all):
            raise ModelError(
                f"the activation at '{name}' ({hook_points[name].module_path}) is divided among the {team.n} processes "
                "of tensor_parallel; choose other hook points, or leave tensor_parallel out"
            )


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: HarvestConfig) -> None:
    """Raise `ModelError` if contexts are too long for the model, or the tokenizer is another model's.

    A tokenizer may have a few more added tokens than the model has embeddings (Gemma 3, Llama 2 with a padding token).
    Text with one of those is refused when it is read.
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
            f"the token '{tokenizer.convert_ids_to_tokens(bos)}' that starts a document has id {bos}, but "
            f"'{config.model}' has {n_embeddings} embeddings; set bos_token to a token below that"
        )
    if tokenizer.vocab_size > MAX_VOCABULARY * n_embeddings:
        raise ModelError(
            f"the tokenizer of '{config.model}' has a vocabulary of {tokenizer.vocab_size}, its model {n_embeddings} "
            "embeddings: the folder holds the tokenizer of another model; save the model's own there"
        )


def embedding_count(model: PreTrainedModel) -> int:
    """Return the number of tokens that have an embedding; raise `ModelError` if the model has no such table."""
    try:
        embeddings: Any = model.get_input_embeddings()
        return embeddings.weight.shape[0]
    except (AttributeError, NotImplementedError):
        raise ModelError(f"{type(model).__name__} has no table of token embeddings; expected a model of text") from None


def metadata_of(config: HarvestConfig, identity: dict[str, Any], plan: HarvestPlan) -> dict[str, Any]:
    """Return the store's metadata on its origin; readers rely on these keys (docs/FORMAT.md)."""
    rules = plan.rules
    adapter = model_parts(config.model, config.adapter).adapter
    optional: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
    if rules.keeps_roles:
        optional["roles"] = list(ROLE_NAMES)
    if rules.keeps_special_tokens:
        optional["special_tokens"] = "tokens"
    if rules.chat is not None:
        optional["chat_template"] = rules.chat.source
    if config.holdout != "documents":
        optional["holdout"] = config.holdout
    return optional | {
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
