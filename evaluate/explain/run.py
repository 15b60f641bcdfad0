"""Explain the latents of an evaluation's SAEs, score the explanations, and show them in its report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...shared.core.compute.device import choose_device
from ...shared.core.config import configured, load_config
from ...shared.core.errors import ConfigError, DataError, MissingFileError
from ...shared.core.paths import user_path
from ...shared.core.terminal.results import print_result
from ...shared.intervene.sae_model import SaeModel
from ...shared.store import ActivationStore
from ..config import EvaluateConfig
from ..features.export import export_indexes
from ..features.files import FeatureIndex
from ..features.token_text import TokenTexts
from ..metrics.held_out import held_out
from ..report.write import write_evaluation_report
from ..results.output import loss_curve
from ..saes.digests import digest_of
from ..saes.names import printable
from ..saes.sae_folders import EvaluatedSae, diverged_saes, load_saes, sae_folders, unique_names
from ..with_model.store_model import model_name, open_model, open_tokenizer
from .causal import Steering
from .config import ExplainConfig
from .corpus import Corpus, Firings, read_corpus, read_firings
from .judge import Counts, Judge, say_estimate
from .llm.cache import AnswerCache
from .llm.client import LlmClient
from .llm.config import CHANGES_NO_ANSWER
from .llm.prompts import PROMPTS
from .notes import shown_explanations
from .rules.search import RuleSearch, in_words, token_frequency_rules
from .rules.views import View, build_views
from .samples import LatentSampler, Sample, SampleSettings
from .scores import ScoreSums, score_intruders, score_rules
from .table import (
    RANDOM_LATENT,
    RULES,
    TOKEN_FREQUENCY,
    Explained,
    explanations_path,
    mean_scores,
    read_metadata,
    write_explanations,
)
from .window_texts import WindowTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

SteeredModel = tuple["PreTrainedModel", "PreTrainedTokenizerBase | None"]
_VERSION = 1
"""Increased whenever the same inputs give other explanations or scores."""
WITHOUT_EFFECT = ("evaluation", "saes", "cache", "cache_bytes")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on disk: its configuration, its store, and the feature indexes that it wrote, by SAE name."""

    folder: Path
    config: EvaluateConfig
    store: ActivationStore
    indexes: dict[str, FeatureIndex]


class Written(dict[str, Path]):
    """The files by SAE name. `complete` says whether a language model was asked all that the settings say."""

    complete = True


def explain(config: ExplainConfig | str | Path | None = None, **settings: Any) -> Written:
    """Write `explanations/NAME.parquet` for each SAE and write the report anew; return the files by SAE name.

    An SAE whose explanations are there already, made from the same index, store and settings, is kept. Explanations
    that a budget cut short are written, and completed by a further call. The configuration is an object, the path of a
    TOML file, or none; keywords replace its keys.

    Raises:
        MissingFileError: there is no evaluation, or it has no feature indexes.
        ConfigError: an SAE or a latent is not in the evaluation, or the key of a language model is not set.
        LlmError: the server of a language model does not answer, or refuses a request.
        OutputBusyError: another process asks a language model about this evaluation.
        StoreError: the store holds no tokens, no training or no held-out contexts.
        NonFiniteError: a latent is NaN or infinite.
    """
    config = configured(ExplainConfig, config, settings)
    evaluation = open_evaluation(config)
    chosen = config.saes or list(evaluation.indexes)
    for name in chosen:
        if name not in evaluation.indexes:
            raise ConfigError(
                f"the evaluation '{config.evaluation}' has no feature index of an SAE '{name}'; it has: "
                f"{', '.join(evaluation.indexes)}"
            )
    prints = {name: _fingerprint(config, evaluation, evaluation.indexes[name]) for name in chosen}
    paths = Written({name: explanations_path(evaluation.indexes[name]) for name in chosen})
    waiting = [name for name in chosen if read_metadata(paths[name]).get("fingerprint") != prints[name]]
    for name in chosen:
        if name not in waiting:
            _log.info(f"kept     the explanations of {printable(name)}")
    if waiting:
        with ExitStack() as stack:
            client = None
            if config.llm is not None:
                cache = stack.enter_context(AnswerCache(paths[waiting[0]].parent / "answers.sqlite"))
                client = stack.enter_context(closing(LlmClient(config.llm, cache, config.seed)))
            _explain_all(config, evaluation, waiting, paths, prints, client)
    if config.llm is not None and config.llm.estimate_only:
        return paths
    report = _show(evaluation)
    print_result(f"report   {printable(str(report))}")
    return paths


def _explain_all(
    config: ExplainConfig,
    evaluation: Evaluation,
    names: Sequence[str],
    paths: Written,
    prints: Mapping[str, str],
    client: LlmClient | None,
) -> None:
    device = choose_device(config.device)
    saes = _load(evaluation, names, device)
    corpus = read_corpus(evaluation.store, config.explain_rows, config.score_rows, config.window)
    tokenizer = open_tokenizer(evaluation.config, evaluation.store)
    ids = np.unique(corpus.tokens).tolist()
    texts = TokenTexts({}, {}) if tokenizer is None else TokenTexts.of(tokenizer, ids)
    views = build_views(corpus, texts)
    model = _model(config, evaluation, device, tokenizer)
    for name in names:
        index = evaluation.indexes[name]
        parts, firings, samples = explain_sae(config, corpus, views, saes[name], index, device, model)
        answered = {}
        if client is not None:
            judge = Judge(client.config, WindowTexts(corpus, texts), firings, samples, config.n_quantiles, config.seed)
            added, answered = _ask(config, client, judge, parts, printable(name))
            if client.config.estimate_only:
                continue
            parts += added
            paths.complete &= not client.exhausted
        means = {part.explainer: mean_scores(part.scores) for part in parts}
        metadata = {
            "name": name,
            "index": index.metadata.get("fingerprint"),
            "fingerprint": prints[name] if paths.complete else None,
            "means": means,
            "n_documents": corpus.test.n_documents,
        }
        write_explanations(paths[name], parts, metadata | answered)
        _say(name, len(parts[0].latents), means)
    if not paths.complete:
        assert client is not None
        _log.warning(f"stopped at the budget ({client.budget}); raise it and run again: what is answered is kept")


def _ask(
    config: ExplainConfig, client: LlmClient, judge: Judge, parts: Sequence[Explained], name: str
) -> tuple[list[Explained], dict[str, Any]]:
    """Return what a language model says of an SAE's latents, with the scores it gives; and what that took."""
    llm, numbers = client.config, judge.chosen()
    explains = "llm" in llm.judged
    n_judged = len(llm.judged)
    say_estimate(client, judge.estimate(numbers, n_judged, explains), name)
    if llm.estimate_only:
        return [], {}
    n, n_groups = len(parts[0].latents), judge.corpus.test.n_groups
    said = {part.explainer: dict(enumerate(part.explanations)) for part in parts}
    asked = Counts.none(n)
    own = judge.explain(client, numbers, asked) if explains else {i: said[RULES][i] for i in numbers}
    judged: dict[str, dict[int, str]] = {}
    if explains:
        judged[llm.model] = own
    for explainer in (RULES, TOKEN_FREQUENCY):
        if explainer in llm.judged:
            judged[f"{explainer}, judged by {llm.model}"] = {i: said[explainer][i] for i in numbers}
    if RANDOM_LATENT in llm.judged and len(own) > 1:
        there = sorted(own)
        others = _others(len(there), config.seed)
        of_others = {number: own[there[other]] for number, other in zip(there, others, strict=True)}
        judged[f"{RANDOM_LATENT}, judged by {llm.model}"] = of_others
    intruders = ScoreSums(n_groups, n)
    if "intruder" in llm.scores:
        judge.score(client, dict.fromkeys(numbers, ""), "intruder", intruders, asked)
    found, reasons = [], asked.reasons
    for explainer, explanations in judged.items():
        sums, counts = ScoreSums(n_groups, n), Counts.none(n)
        sums.sums |= {key: intruders.sums[key] for key in ("right", "trials")}
        for score in llm.scores:
            if score != "intruder":
                judge.score(client, explanations, score, sums, counts)
        if explainer == llm.model:
            counts.answers += asked.answers
            counts.bad += asked.bad
        reasons.update(counts.reasons)
        kept = np.array(sorted(explanations), dtype=np.int64)
        scores = {key: value[kept] for key, value in sums.table(config.bootstrap_samples, config.seed).items()}
        active, inactive = (column[kept] for column in (parts[0].n_active, parts[0].n_inactive))
        texts = [explanations[i] for i in kept.tolist()]
        found.append(
            Explained(
                *(explainer, parts[0].latents[kept], texts, scores, active, inactive, PROMPTS),
                *(counts.answers[kept], counts.bad[kept]),
            )
        )
    bad = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    print_result(f"asked    {llm.model}: {client.n_sent:,} calls, {client.n_cached:,} answered before; {client.budget}")
    print_result(f"         bad answers: {bad}")
    return found, {"prompts": PROMPTS, "bad_answers": dict(reasons)}


def open_evaluation(config: ExplainConfig) -> Evaluation:
    """Open an evaluation folder, its store and its feature indexes."""
    folder = user_path(config.evaluation)
    settings = folder / "config.toml"
    if not settings.is_file() or not (folder / "metrics.json").is_file():
        raise MissingFileError(f"no evaluation in '{folder}'; give the output folder of `thresher evaluate`")
    evaluated = load_config(EvaluateConfig, settings, [])
    found = [FeatureIndex.open(path) for path in sorted((folder / "features").glob("*.parquet"))]
    if not found:
        raise MissingFileError(
            f"the evaluation '{folder}' has no feature index; run `thresher evaluate` with feature_rows above 0"
        )
    cache = config.cache or evaluated.cache
    store = ActivationStore.open(evaluated.store, cache=cache, cache_bytes=config.cache_bytes, roles=evaluated.roles)
    order = {row["name"]: i for i, row in enumerate(_metrics(folder))}
    found.sort(key=lambda index: order.get(index.name, len(order)))
    return Evaluation(folder, evaluated, store, {index.name: index for index in found})


def _load(evaluation: Evaluation, names: Sequence[str], device: str) -> dict[str, EvaluatedSae]:
    folders = sae_folders(evaluation.config.saes)
    by_name = dict(zip(unique_names(folders), folders, strict=True))
    absent = [name for name in names if name not in by_name]
    if absent:
        raise MissingFileError(f"the SAE '{absent[0]}' of the evaluation is no longer in {evaluation.config.saes}")
    loaded = {}
    for name in names:
        [sae] = load_saes([by_name[name]], evaluation.store, device)
        loaded[name] = EvaluatedSae(name, sae.path, sae.sae, sae.hook_point, sae.target)
    return loaded


def _fingerprint(config: ExplainConfig, evaluation: Evaluation, index: FeatureIndex) -> str:
    settings = {name: getattr(config, name) for name in config.__struct_fields__ if name not in WITHOUT_EFFECT}
    llm = settings.pop("llm")
    if llm is not None:
        asked = {name: getattr(llm, name) for name in llm.__struct_fields__ if name not in CHANGES_NO_ANSWER}
        settings["llm"] = [PROMPTS, asked]
    return digest_of([_VERSION, settings, index.metadata.get("fingerprint"), evaluation.store.manifest.checksum])


def explain_sae(
    config: ExplainConfig,
    corpus: Corpus,
    views: Sequence[View],
    sae: EvaluatedSae,
    index: FeatureIndex,
    device: str,
    model: SteeredModel | None = None,
) -> tuple[list[Explained], Firings, list[Sample]]:
    """Return the rules of an SAE's latents and the two baselines, with their scores; and what these were made from."""
    latents = chosen_latents(config, index)
    neighbours = _neighbours(index, latents) if config.negatives == "neighbours" else None
    needed = np.concatenate([latents, *(np.array(others, np.int64) for others in (neighbours or {}).values())])
    near = read_firings(corpus, sae, needed, device)
    firings = near.select(latents)
    search = RuleSearch(corpus, firings, views, config.max_parts, config.seed)
    rules = search.search()
    settings = SampleSettings(config.n_score, config.n_quantiles, config.n_intruder_trials, neighbours, config.seed)
    sampler = LatentSampler(corpus, firings, settings, near)
    samples = [sampler.draw(number) for number in range(len(latents))]
    intruders = ScoreSums(corpus.test.n_groups, len(latents))
    score_intruders(corpus, views, samples, intruders)
    frequent = token_frequency_rules(search, [len(rule) for rule in rules])
    explainers = {RULES: rules, TOKEN_FREQUENCY: frequent}
    if len(latents) > 1:
        explainers[RANDOM_LATENT] = [rules[other] for other in _others(len(latents), config.seed)]
    caused = {}
    if model is not None:
        lm = SaeModel.open(model[0], {sae.hook_point: sae.sae}, tokenizer=model[1])
        caused = Steering(lm, corpus, views, firings, sae.name).scores(explainers, config)
    parts = []
    for explainer, said in explainers.items():
        sums = ScoreSums(corpus.test.n_groups, len(latents))
        sums.sums |= {key: intruders.sums[key] for key in ("right", "trials")}
        score_rules(corpus, firings, views, said, samples, sums)
        scores = sums.table(config.bootstrap_samples, config.seed) | caused.get(explainer, {})
        texts = [in_words(rule, views) for rule in said]
        parts.append(Explained(explainer, latents, texts, scores, *_counts(samples)))
    return parts, firings, samples


def _model(
    config: ExplainConfig, evaluation: Evaluation, device: str, tokenizer: PreTrainedTokenizerBase | None
) -> SteeredModel | None:
    """Return the model to steer, if causal scores are asked for."""
    if not config.causal:
        return None
    model = open_model(evaluation.config, evaluation.store, device)
    if model is None:
        raise ConfigError(
            "causal = true needs the model that was harvested, and the evaluation ran without one; evaluate with it, "
            "or set causal = false"
        )
    return model.float(), tokenizer


def chosen_latents(config: ExplainConfig, index: FeatureIndex) -> np.ndarray:
    """Return the latents to explain, in order: those that the configuration names, else a choice of those that fire."""
    if config.latents is not None:
        if max(config.latents) >= index.n_latents:
            raise ConfigError(
                f"latents: SAE '{index.name}' has latents 0 to {index.n_latents - 1}, got {max(config.latents)}"
            )
        return np.unique(np.array(config.latents, dtype=np.int64))
    live = np.flatnonzero(index.columns(["firings"])["firings"].to_numpy() > 0)
    if not len(live):
        raise DataError(
            f"no latent of SAE '{index.name}' fires on the rows of its feature index; there is nothing to explain"
        )
    rng = np.random.default_rng(config.seed)
    return np.sort(rng.permutation(live)[: config.max_latents])


def _others(n: int, seed: int) -> np.ndarray:
    """Return another number than its own for each of 0 to n - 1, each once, at random."""
    order = np.random.default_rng([seed, n]).permutation(n)
    others = np.empty(n, dtype=np.int64)
    others[order] = np.roll(order, 1)
    return others


def _neighbours(index: FeatureIndex, latents: np.ndarray) -> dict[int, list[int]]:
    table = index.columns(["neighbours"])["neighbours"].to_pylist()
    return {int(latent): [other["latent"] for other in table[latent]] for latent in latents}


def _counts(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    active = np.array([int(sample.active.sum()) for sample in samples])
    return active, np.array([len(sample.windows) for sample in samples]) - active


def _say(name: str, n_latents: int, means: Mapping[str, Mapping[str, float]]) -> None:
    print_result(f"explained {n_latents:,} latents of {printable(name)}; mean scores on held-out documents:")
    for explainer, scores in means.items():
        shown = "  ".join(f"{score.replace('_', ' ')} {value:.3f}" for score, value in scores.items())
        print_result(f"  {explainer:<16} {shown}")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_bytes())


def _show(evaluation: Evaluation) -> Path:
    """Write the evaluation's report, and its export if it has one, with the explanations that are there."""
    config, store = evaluation.config, evaluation.store
    rows, name = held_out(store, config.max_rows), model_name(config, store)
    metrics = _metrics(evaluation.folder)
    folders = sae_folders(config.saes)
    curves = {name: loss_curve(folder) for name, folder in zip(unique_names(folders), folders, strict=True)}
    failed = {row["name"]: row["error"] for row in metrics if row.get("error")}
    explanations = {name: shown_explanations(index) for name, index in evaluation.indexes.items()}
    if "neuronpedia" in config.export:
        dataset = str(store.metadata.get("dataset") or "")
        export_indexes(evaluation.indexes, evaluation.folder / "neuronpedia", name, dataset, explanations)
    return write_evaluation_report(
        evaluation.folder,
        rows,
        name,
        metrics,
        curves,
        evaluation.indexes,
        explanations=explanations,
        failed=failed,
        diverged=diverged_saes(config.saes),
    )
