"""Does steering a latent make its explanation truer of the text that the model goes on to write?

Held-out texts are continued three times with the same random numbers: as the model alone does it, with the latent
steered, and with another latent steered by a vector of the same length. A rule's causal score is the share of
generated tokens on which it fires with the latent steered, minus that share with the other latent steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from ...shared.core.errors import ConfigError, DataError
from ...shared.core.terminal.progress import progress as show_progress
from ...shared.intervene.edits import Add, Edit
from ...shared.intervene.sae_model import SaeModel
from ...shared.intervene.spliced_model import Target
from ...shared.model.loading.context_limit import context_limit
from ..features.token_text import TokenTexts
from ..metrics.bootstrap import CONFIDENCE, resampling_weights
from .config import ExplainConfig
from .corpus import Corpus, Firings
from .rules.search import Condition, Part, Rule, predicted
from .rules.views import View, build_views
from .scores import CAUSAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Continuations:
    """The tokens of prompts and of what was generated after each, `length` in all, as rows of equal width.

    `prompt` is the first row of the corpus that each begins with, `begins` where the generated tokens begin.
    """

    tokens: Int32[np.ndarray, "texts width"]
    length: Int64[np.ndarray, " texts"]
    prompt: Int64[np.ndarray, " texts"]
    begins: int


class Steering:
    """Steers latents of one SAE of a model, and says on how many generated tokens rules fire."""

    def __init__(self, lm: SaeModel, corpus: Corpus, views: Sequence[View], firings: Firings, sae_name: str):
        [self.key] = lm.saes
        sae = lm.saes[self.key]
        if "W_dec" not in sae._parameters:
            raise ConfigError(f"causal = true: SAE '{sae_name}' has several decoders; expected an SAE with one")
        self.lm, self.corpus, self.views, self.firings = lm, corpus, views, firings
        self.norms = sae.W_dec.detach().double().norm(dim=1).cpu().numpy()

    def prompts(self, config: ExplainConfig) -> tuple[Int64[np.ndarray, " prompts"], int]:
        """Return the first rows of held-out contexts to continue, of different documents if there are enough.

        The second value is how many tokens of each are the prompt; a context has room for the rest.
        """
        corpus = self.corpus
        limit = context_limit(self.lm.model)
        size = corpus.context_size if limit is None else min(corpus.context_size, limit)
        length = size - min(config.causal_tokens, size // 2)
        first = np.arange(corpus.n_train, corpus.n_rows, corpus.context_size)
        whole = np.array([corpus.usable[row + length // 2 : row + length].any() for row in first], dtype=bool)
        first = np.random.default_rng([config.seed, 11]).permutation(first[whole])
        group = corpus.group[first + length - 1]
        _, where = np.unique(group, return_index=True)
        order = np.concatenate([np.sort(where), np.setdiff1d(np.arange(len(first)), where)])
        if not len(order):
            raise DataError("causal = true needs held-out contexts to continue, and the store has none that are usable")
        return first[order[: config.causal_prompts]], length

    def chosen(self, rules: Sequence[Rule], config: ExplainConfig) -> list[int]:
        """Return the numbers of the latents to steer: at most `latents` of those with a rule, at random."""
        there = [number for number, rule in enumerate(rules) if rule and self.largest[number] > 0]
        order = np.random.default_rng([config.seed, 13]).permutation(len(there))[: config.causal_latents]
        return [there[i] for i in np.sort(order)]

    @cached_property
    def largest(self) -> list[float]:
        """The largest activation of each latent on training rows."""
        found = map(self.firings.of, range(len(self.firings.latents)))
        return [float(value[row < self.corpus.n_train].max(initial=0)) for row, value in found]

    def continuations(self, edits: dict[int, float], config: ExplainConfig) -> Continuations:
        """Return the continuations of the prompts with amounts added to latents, in which `seed` is the chance."""
        first, length = self.prompts(config)
        texts = [self.corpus.tokens[row : row + length].tolist() for row in first]
        steered: dict[Target, Edit] = {(self.key, latent): Add(amount) for latent, amount in edits.items()}
        room = min(config.causal_tokens, self.corpus.context_size - length)
        with self.lm.steer(steered):
            more = self.lm.generate_tokens(texts, room, seed=config.seed)
        tokens = np.full((len(first), length + room), self.corpus.tokens[first[0]], dtype=np.int32)
        for line, (text, new) in enumerate(zip(texts, more, strict=True)):
            tokens[line, : length + len(new)] = [*text, *new]
        return Continuations(tokens, np.array([length + len(new) for new in more]), first, length)

    def scores(
        self, explained: Mapping[str, Sequence[Rule]], config: ExplainConfig
    ) -> dict[str, dict[str, Float64[np.ndarray, " latents"]]]:
        """Return by explainer `causal` and `causal_clean` with intervals (`_low`, `_high`) of every latent.

        `causal` compares with the other steered latent, `causal_clean` with the model alone. NaN where a latent was
        not steered.
        """
        n = len(self.firings.latents)
        numbers = self.chosen(next(iter(explained.values())), config)
        names = [f"{name}{end}" for name in CAUSAL for end in ("", "_low", "_high")]
        found = {explainer: {name: np.full(n, np.nan) for name in names} for explainer in explained}
        if not numbers:
            return found
        written = [self.continuations({}, config)]
        at: dict[int, list[int]] = {}
        for number in show_progress(numbers, unit="latent", desc="steer"):
            at[number] = [0, *range(len(written), len(written) + 2)]
            written += [self.continuations(edits, config) for edits in self._edits(number, config)]
            at[number] = at[number][: 1 + len(written) - at[number][1]]
        needed = [rules[number] for rules in explained.values() for number in numbers]
        texts = WrittenTexts(self.corpus, self.views, needed, written, self.lm.tokenizer)
        generated = np.stack([part.length - part.begins for part in written])
        for explainer, rules in explained.items():
            for number in numbers:
                fires = texts.fires_on(rules[number]).sum(axis=2)
                for name, against in (("causal", at[number][2:]), ("causal_clean", at[number][:1])):
                    for other in against:
                        both = [at[number][1], other]
                        values = difference(fires[both], generated[both], config.bootstrap_samples, config.seed)
                        for end, value in zip(("", "_low", "_high"), values, strict=True):
                            found[explainer][f"{name}{end}"][number] = value
        return found

    def _edits(self, number: int, config: ExplainConfig) -> list[dict[int, float]]:
        """Return what is added to the latent, and, if there is one, to another: a vector of the same length."""
        latents = self.firings.latents
        latent = int(latents[number])
        amount = config.causal_strength * self.largest[number]
        rest = [other for other in range(len(latents)) if other != number and self.largest[other] > 0]
        if not rest:
            return [{latent: amount}]
        other = int(latents[np.random.default_rng([config.seed, latent, 17]).choice(rest)])
        return [{latent: amount}, {other: amount * self.norms[latent] / max(self.norms[other], 1e-12)}]


def difference(
    fires: Int64[np.ndarray, "2 prompts"], generated: Int64[np.ndarray, "2 prompts"], n_samples: int, seed: int
) -> tuple[float, float, float]:
    """Return the first share of tokens minus the second, and its 95% interval over resamples of the prompts.

    A share is of all tokens of all prompts. The interval is NaN with fewer than two prompts.
    """
    weights = np.ones((1, fires.shape[1]))
    if n_samples and fires.shape[1] > 1:
        weights = np.concatenate([weights, resampling_weights(fires.shape[1], n_samples, seed)])
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = ((weights @ fires[way]) / (weights @ generated[way]) for way in (0, 1))
    values = (first - second)[1:]
    values = values[np.isfinite(values)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (np.nan, np.nan)
    return float((first - second)[0]), float(low), float(high)


class WrittenTexts:
    """Continuations as a corpus of their own, in which rules that were found in another corpus hold as well.

    Views number their values per corpus. A rule is carried over by contexts in which its conditions hold: they are in
    the new corpus too, and the value that such a row has there is the condition's.
    """

    def __init__(
        self,
        corpus: Corpus,
        views: Sequence[View],
        rules: Sequence[Rule],
        written: Sequence[Continuations],
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        size = corpus.context_size
        conditions = {condition for rule in rules for part in rule for condition in part.conditions}
        # Two rows of each, because a pair of tokens counts as one only if it occurs more than once.
        self._rows = {condition: views[condition[0]].rows_with(condition[1])[:2] for condition in conditions}
        self._contexts = np.unique(np.concatenate([np.zeros(0, np.int64), *(r // size for r in self._rows.values())]))
        known = (self._contexts[:, None] * size + np.arange(size)).reshape(-1)
        self.shape = (len(written), len(written[0].tokens), size)
        self.begins = written[0].begins
        tokens = np.zeros(self.shape, np.int32) + written[0].tokens[0, 0]
        usable, position = np.zeros(self.shape, bool), np.zeros(self.shape, np.int64)
        columns = np.arange(size)
        for number, part in enumerate(written):
            tokens[number, :, : part.tokens.shape[1]] = part.tokens
            usable[number] = columns < part.length[:, None]
            of_prompt = corpus.position[part.prompt[:, None] + columns.clip(max=part.begins - 1)]
            position[number] = np.where(of_prompt < 0, -1, of_prompt + (columns - part.begins + 1).clip(0))
        self.first = len(known)
        all_tokens = np.concatenate([corpus.tokens[known], tokens.reshape(-1)])
        self.corpus = Corpus(
            corpus.train,
            corpus.test,
            all_tokens,
            np.concatenate([np.zeros(len(known), bool), usable.reshape(-1)]),
            np.zeros(len(all_tokens), np.int64),
            np.concatenate([corpus.position[known], position.reshape(-1)]),
            size,
            corpus.window,
        )
        ids = np.unique(all_tokens).tolist()
        self.views = build_views(
            self.corpus, TokenTexts({}, {}) if tokenizer is None else TokenTexts.of(tokenizer, ids)
        )

    def _carried(self, condition: Condition) -> Condition:
        context, within = divmod(int(self._rows[condition][0]), self.corpus.context_size)
        row = int(np.searchsorted(self._contexts, context)) * self.corpus.context_size + within
        return condition[0], int(self.views[condition[0]].value[row])

    def fires_on(self, rule: Rule) -> Bool[np.ndarray, "written texts generated"]:
        """Return on which generated tokens a rule fires."""
        there = tuple(
            Part(tuple(map(self._carried, part.conditions)), part.activation, part.precision) for part in rule
        )
        rows, _ = predicted(self.corpus, self.views, there, self.first, self.corpus.n_rows)
        held = np.zeros(self.corpus.n_rows, dtype=bool)
        held[rows] = True
        return held[self.first :].reshape(self.shape)[:, :, self.begins :]
