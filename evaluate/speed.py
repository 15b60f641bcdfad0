"""What an evaluation takes, extrapolated from small parts of one that are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..shared.store import ActivationStore
from .config import EvaluateConfig
from .features.build import FeatureSettings, read_blocks
from .features.logits import logit_effects
from .metrics.held_out import HeldOut, training_rows
from .metrics.offline import accumulate
from .saes.digests import vocabulary
from .saes.sae_folders import EvaluatedSae
from .with_model.splice_losses import accumulate_losses
from .with_model.store_model import splice_points

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAST_TOKENS = 256
"""Tokens to time on a CPU, whose speed does not depend on the batch; on a GPU it is a batch."""
_LATENTS = 512


@dataclass(frozen=True)
class EvaluationSpeed:
    """Seconds of an evaluation of all SAEs.

    `offline` is per held-out row, `model` per held-out token that the model runs on, for all of its runs (clean,
    ablated, and with each SAE), `features` per row of the feature index, and `effects` for all latents' logit effects.
    """

    offline: float
    model: float
    features: float
    effects: float

    def seconds(self, config: EvaluateConfig, n_rows: int, n_held_out: int) -> float:
        """Return the seconds of an evaluation of a store with this many rows, without loading the model."""
        offline = self.offline * min(n_held_out, config.max_rows or n_held_out)
        features = self.effects + self.features * min(config.feature_rows, n_rows) if config.feature_rows else 0.0
        return offline + self.model * model_tokens(config, n_held_out) + features


def model_tokens(config: EvaluateConfig, n_held_out: int) -> int:
    """Return how many held-out tokens an evaluation runs the model on."""
    return 0 if config.model is False else min(n_held_out, config.max_rows or n_held_out, config.model_rows)


def measure_evaluation(
    config: EvaluateConfig,
    store: ActivationStore,
    saes: Sequence[EvaluatedSae],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> EvaluationSpeed:
    """Time parts of an evaluation on a small store, none of which needs to be held out; `folder` takes its files.

    What is left out takes seconds: comparing decoder directions, and writing the index and the report.
    """
    device = next(model.parameters()).device
    runs_model = config.model is not False
    rows = training_rows(store)
    n_contexts = max(1, _LEAST_TOKENS // store.context_size) if device.type == "cpu" else config.batch_size
    part = rows.subset(n_contexts * store.context_size)
    offline = _seconds(lambda: accumulate(saes, part, config.block_rows, str(device))) / part.n_rows
    in_model = _in_model(config, saes, part, model) if runs_model else 0.0
    features = effects = 0.0
    if config.feature_rows:
        paths = {sae.name: folder / f"{number}.parquet" for number, sae in enumerate(saes)}
        settings = FeatureSettings(max_rows=config.feature_rows)
        read = _seconds(lambda: read_blocks(store, saes, settings, paths, dict.fromkeys(paths, "")))
        features = read / store.n_rows
        effects = _effects(saes, model, tokenizer, settings.n_tokens) if runs_model else 0.0
    return EvaluationSpeed(offline, in_model, features, effects)


def _effects(
    saes: Sequence[EvaluatedSae], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, n_tokens: int
) -> float:
    """Return the seconds of all latents' logit effects, from some of one SAE's."""
    tokens = vocabulary(tokenizer)
    ids = None if tokens is None else list(tokens.values())
    directions = saes[0].sae.W_dec.detach()[:_LATENTS]
    seconds = _seconds(lambda: logit_effects(model, directions, saes[0].target, n_tokens, vocabulary=ids))
    return seconds / len(directions) * sum(sae.sae.d_sae for sae in saes)


def _in_model(config: EvaluateConfig, saes: Sequence[EvaluatedSae], part: HeldOut, model: PreTrainedModel) -> float:
    """Return the seconds per token of the faster of two passes: the first one prepares kernels and memory."""
    points = splice_points(model, saes, part.store)
    once, again = [_seconds(lambda: accumulate_losses(model, points, saes, part, config.batch_size)) for _ in range(2)]
    return min(once, again) / part.usable.size


def _seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started
