"""k-sparse probing on labelled texts: can a few latents tell which label a text has?

The model runs on the texts, and a text's latents are their means over its tokens. A task is one label against the
others, balanced, and equal texts are in the same split. Latents are chosen and classifiers fitted as in probing for
next tokens. Means over tokens and one label against the others are as in SAEBench's sparse probing (arXiv 2503.09532).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...shared.core.errors import ConfigError, MissingFileError
from ...shared.core.terminal.progress import progress
from ...shared.intervene.texts import pad, token_lists
from ...shared.model.capture import capturing
from ...shared.model.hook_points import ResolvedHookPoint, members
from ...shared.model.loading.placement import input_device
from ...shared.store import ActivationStore
from ..config import EvaluateConfig
from ..metrics.encoding import rows_at_a_time
from ..saes.hook_group import concatenate
from ..saes.sae_folders import EvaluatedSae
from .probing import Task, dense_latents, mean_accuracies, next_token_tasks, probe_hits, sparse_hits

N_LABELS = 10
"""How many of the most frequent labels are probed for."""


class LabelledTexts(NamedTuple):
    """Texts, and the label of each."""

    texts: list[str]
    labels: list[str]


class LabelProbes(NamedTuple):
    """Labelled texts, the tokens of those that the model runs on, and the tasks, which number these."""

    source: LabelledTexts
    tokens: list[list[int]]
    tasks: list[Task]


def read_labelled_texts(path: str) -> LabelledTexts:
    """Return the texts of a JSONL file, of one object with `text` and `label` per line; a repeated line once.

    Raises:
        MissingFileError: there is no such file.
        ConfigError: a line is no such object, or all texts have the same label.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise MissingFileError(f"probe_texts = '{path}' cannot be read: {error.strerror}") from None
    found: dict[tuple[str, str], None] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            found[_text_and_label(line, f"{path}, line {number}")] = None
    labels = [label for _, label in found]
    if len(set(labels)) < 2:
        raise ConfigError(f"probe_texts = '{path}' has {len(set(labels))} labels, expected at least two")
    return LabelledTexts([text for text, _ in found], labels)


def _text_and_label(line: bytes, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        text, label = row["text"], row["label"]
    except (ValueError, KeyError, TypeError):
        text = label = None
    if not isinstance(text, str) or not text.strip() or not isinstance(label, str | int):
        raise ConfigError(f'{where}: expected an object like {{"text": "Some words.", "label": "name"}}')
    return text, str(label)


def label_tasks(labels: Sequence[str], texts: Sequence[str], seed: int) -> list[Task]:
    """Return balanced tasks for the most frequent labels; `token` is the label's place among the sorted ones.

    Equal texts are in the same split, whatever their labels.
    """
    codes = np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)[1]
    _, same = np.unique(np.array(texts, dtype=object).astype(str), return_inverse=True)
    group = np.random.default_rng(seed).permutation(int(same.max()) + 1)[same]
    return next_token_tasks(codes, group, N_LABELS, seed)


def label_probes(
    labelled: LabelledTexts, tokenizer: PreTrainedTokenizerBase, store: ActivationStore, config: EvaluateConfig
) -> LabelProbes:
    """Return the tasks of as many texts, in a random order, as fill `config.model_rows` tokens.

    Each text is cut to the store's context.

    Raises:
        ConfigError: they are too few for a single task.
    """
    order = np.random.default_rng(config.seed).permutation(len(labelled.texts))
    bos = store.metadata.get("bos_token_id")
    tokens: list[list[int]] = []
    n_tokens = 0
    for number in order.tolist():
        (ids,) = token_lists(labelled.texts[number], tokenizer, bos, None)
        tokens.append(ids[: store.context_size])
        n_tokens += len(tokens[-1])
        if n_tokens >= config.model_rows:
            break
    chosen = order[: len(tokens)].tolist()
    tasks = label_tasks([labelled.labels[i] for i in chosen], [labelled.texts[i] for i in chosen], config.seed)
    if not tasks:
        raise ConfigError(
            f"probe_texts = '{config.probe_texts}' has too few texts to probe: {len(tokens):,} of "
            f"{len(labelled.texts):,} fit into model_rows = {config.model_rows:,} tokens, and no label has ten for "
            "testing; give more texts or a larger model_rows"
        )
    return LabelProbes(labelled, tokens, tasks)


def labelled_probing(
    saes: Sequence[EvaluatedSae],
    probes: LabelProbes,
    model: PreTrainedModel,
    hook_points: dict[str, ResolvedHookPoint],
    store: ActivationStore,
    config: EvaluateConfig,
) -> dict[str, dict[str, Any]]:
    """Return each SAE's mean accuracy over the labels for each k, and that of the baseline on the activations.

    `confidence_95` has their intervals over texts.
    """
    tokens, tasks = probes.tokens, probes.tasks
    read = list(dict.fromkeys(name for sae in saes for name in members(sae.hook_point)))
    rows, text = _activations(model, {name: hook_points[name] for name in read}, tokens, store, config.batch_size)
    results: dict[str, dict[str, Any]] = {}
    baseline: dict[str, list[Tensor]] = {}
    for sae in progress(saes, unit="SAE", desc="probe labels"):
        x = concatenate(rows, sae.hook_point)
        if sae.hook_point not in baseline:
            pooled = _means([x.float()], text, len(tokens), x.shape[1])
            splits = [(pooled[task.train], task.train_labels, pooled[task.test], task.test_labels) for task in tasks]
            baseline[sae.hook_point] = [probe_hits(*split) for split in splits]
        parts = (dense_latents(sae, part.float()) for part in x.split(rows_at_a_time(sae.sae)))
        pooled = _means(parts, text, len(tokens), sae.sae.d_sae)
        found = [sparse_hits(pooled[task.train], pooled[task.test], task) for task in tasks]
        hits = {f"label_accuracy_k{k}": [one[k] for one in found] for k in found[0]}
        hits["label_accuracy_activations"] = baseline[sae.hook_point]
        results[sae.name] = {"label_tasks": len(tasks), **mean_accuracies(tasks, hits, config)}
    return results


@torch.inference_mode()
def _activations(
    model: PreTrainedModel,
    hook_points: dict[str, ResolvedHookPoint],
    tokens: Sequence[Sequence[int]],
    store: ActivationStore,
    batch_size: int,
) -> tuple[dict[str, Float[Tensor, "rows d"]], Int64[Tensor, " rows"]]:
    """Return the activations of all tokens that the store does not mask, and the text of each, in order."""
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_points}
    text: list[Tensor] = []
    masked = torch.tensor(store.mask_token_ids, dtype=torch.long)
    with capturing(model, hook_points) as read:
        for start in progress(range(0, len(tokens), batch_size), unit="batch", desc="labelled texts"):
            batch, lengths = pad(tokens[start : start + batch_size], 0)
            usable = (torch.arange(batch.shape[1]) < lengths[:, None]) & ~torch.isin(batch, masked)
            for name, activation in read(batch.to(input_device(model))).items():
                parts[name].append(activation.cpu()[usable])
            text.append(start + usable.nonzero()[:, 0])
    return {name: torch.cat(some) for name, some in parts.items()}, torch.cat(text)


def _means(
    parts: Iterator[Float[Tensor, "rows d"]] | list[Tensor], text: Int64[Tensor, " rows"], n_texts: int, d: int
) -> Float[Tensor, "texts d"]:
    """Return the mean of each text's rows, which come in parts; zero for a text without rows."""
    total, done = torch.zeros(n_texts, d), 0
    for part in parts:
        total.index_add_(0, text[done : done + len(part)], part)
        done += len(part)
    return total / torch.bincount(text, minlength=n_texts).clamp_min(1)[:, None]
