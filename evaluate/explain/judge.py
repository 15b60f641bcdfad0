"""Let a language model explain latents, and judge explanations on the same held-out windows as rules are scored on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...shared.core.terminal.results import print_result
from .corpus import Firings
from .llm import answers, prompts
from .llm.answers import BadAnswerError
from .llm.client import LlmClient
from .llm.config import LlmConfig
from .llm.request import Answer, ChatRequest
from .samples import HIGHLIGHT, Sample, windows_by_quantile
from .scores import ScoreSums
from .window_texts import WindowTexts

TYPICAL_EXPLANATION = "x" * 200
"""Stands for an explanation that is not there yet, to estimate what its judgements take."""
TYPICAL_TOKENS = {"explain": 60, "detection": 40, "fuzzing": 40, "simulation": 120, "intruder": 15}
"""Tokens of an answer, about."""
LATENTS_AT_A_TIME = 32


@dataclass(frozen=True)
class Question:
    """A request about a latent, and what to do with its answer; that raises `BadAnswerError` if it is of no use."""

    number: int
    request: ChatRequest
    use: Callable[[Answer], None]


@dataclass
class Counts:
    """Per latent, how many questions were answered and how many of these answers were bad; reasons over all."""

    answers: np.ndarray
    bad: np.ndarray
    reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def none(cls, n: int) -> Counts:
        """Return counts of zero for `n` latents."""
        return cls(np.zeros(n, np.int64), np.zeros(n, np.int64))


class Judge:
    """Asks a language model about the latents of `firings`, whose held-out windows are `samples`."""

    def __init__(
        self,
        config: LlmConfig,
        contexts: WindowTexts,
        firings: Firings,
        samples: Sequence[Sample],
        n_quantiles: int,
        seed: int,
    ):
        self.config, self.contexts, self.corpus = config, contexts, contexts.corpus
        self.firings, self.samples, self.n_quantiles, self.seed = firings, samples, n_quantiles, seed
        self.largest = []
        for number in range(len(firings.latents)):
            row, value = firings.of(number)
            self.largest.append(float(value[row < self.corpus.n_train].max(initial=0)))

    def chosen(self) -> list[int]:
        """Return the numbers of the latents to ask about: at most `max_latents` of those with held-out windows."""
        there = [number for number, sample in enumerate(self.samples) if len(sample.windows)]
        order = np.random.default_rng([self.seed, 7]).permutation(len(there))[: self.config.max_latents]
        return [there[i] for i in np.sort(order)]

    def explain(self, client: LlmClient, numbers: Sequence[int], counts: Counts) -> dict[int, str]:
        """Return the model's explanations of some latents; bad answers and those beyond the budget have none."""
        found: dict[int, str] = {}
        for start in range(0, len(numbers), LATENTS_AT_A_TIME):
            some = numbers[start : start + LATENTS_AT_A_TIME]
            questions = [self._explanation(number, found) for number in some]
            self._ask(client, [question for question in questions if question], "explain", counts)
        return found

    def score(
        self, client: LlmClient, explanations: dict[int, str], score: str, sums: ScoreSums, counts: Counts
    ) -> None:
        """Add what the model says of explanations, or of intruders, to the sums; none beyond the budget."""
        numbers = sorted(explanations)
        for start in range(0, len(numbers), LATENTS_AT_A_TIME):
            questions = []
            for number in numbers[start : start + LATENTS_AT_A_TIME]:
                questions += self._questions(score, number, explanations[number], sums)
            self._ask(client, questions, score, counts)

    def _ask(self, client: LlmClient, questions: Sequence[Question], desc: str, counts: Counts) -> None:
        found = client.ask([question.request for question in questions], desc)
        cut = {question.number for question, answer in zip(questions, found, strict=True) if answer is None}
        for question, answer in zip(questions, found, strict=True):
            if answer is None or question.number in cut:
                continue
            counts.answers[question.number] += 1
            try:
                question.use(answer)
            except BadAnswerError as error:
                counts.bad[question.number] += 1
                counts.reasons[str(error)] += 1

    def estimate(self, numbers: Sequence[int], n_judged: int, explains: bool) -> list[ChatRequest]:
        """Return the requests that some latents take, with a typical text in place of explanations."""
        found: list[ChatRequest] = []
        nowhere = ScoreSums(self.corpus.test.n_groups, len(self.samples))
        for number in numbers:
            own = self._explanation(number, {}) if explains else None
            found += [own.request] if own else []
            for score in self.config.scores:
                questions = self._questions(score, number, TYPICAL_EXPLANATION, nowhere)
                found += [question.request for question in questions] * (1 if score == "intruder" else n_judged)
        return found

    def _explanation(self, number: int, found: dict[int, str]) -> Question | None:
        """Return the question for an explanation, from training windows alone."""
        row, value = self.firings.of(number)
        kept = (row < self.corpus.n_train) & (self.corpus.window_of[row] >= 0)
        row, value = row[kept], value[kept]
        if not len(row):
            return None
        rng = np.random.default_rng([self.seed, int(self.firings.latents[number]), 1])
        windows = windows_by_quantile(self.corpus.window_of[row], value, self.config.n_explain, self.n_quantiles, rng)
        most, texts, active = float(value.max()), [], []
        strongest = []
        for window in windows.tolist():
            here = np.flatnonzero(self.corpus.window_of[row] == window)
            strong = here[value[here] > HIGHLIGHT * most] if (value[here] > HIGHLIGHT * most).any() else here
            places = self.contexts.places(window, row[strong])
            levels = np.ceil(10 * value[strong] / most).astype(int).tolist()
            texts.append(self.contexts.pieces(window))
            active.append(dict(zip(places, levels, strict=True)))
            strongest.append(float(value[here].max()))
        order = np.argsort(strongest, kind="stable").tolist()
        request = prompts.ask_explanation(
            [texts[i] for i in order], [active[i] for i in order], self.config.max_explanation_tokens
        )

        def use(answer: Answer) -> None:
            found[number] = answers.explanation(answer)

        return Question(number, request, use)

    def _questions(self, score: str, number: int, explanation: str, sums: ScoreSums) -> list[Question]:
        if score == "intruder":
            return self._intruders(number, sums)
        if score == "simulation":
            return self._simulations(number, explanation, sums)
        sample = self.samples[number]
        rng = np.random.default_rng([self.seed, int(self.firings.latents[number]), 2])
        order = rng.permutation(len(sample.windows))
        size = self.config.contexts_per_call
        return [
            self._batch(score, number, explanation, order[start : start + size], sums)
            for start in range(0, len(order), size)
        ]

    def _batch(self, score: str, number: int, explanation: str, items: np.ndarray, sums: ScoreSums) -> Question:
        sample, corpus = self.samples[number], self.corpus
        windows = sample.windows[items]
        texts = [self.contexts.pieces(window) for window in windows.tolist()]
        most = self.config.max_judgement_tokens
        if score == "detection":
            request = prompts.detect(explanation, texts, most)
        else:
            rows = [sample.highlights[i] for i in items]
            marked = [self.contexts.places(w, r) for w, r in zip(windows.tolist(), rows, strict=True)]
            request = prompts.fuzz(explanation, texts, marked, most)

        def use(answer: Answer) -> None:
            said = np.array(answers.yes_or_no(answer, len(items)))
            sums.add_answers(score, number, corpus.window_group[windows], sample.active[items], said)

        return Question(number, request, use)

    def _simulations(self, number: int, explanation: str, sums: ScoreSums) -> list[Question]:
        sample = self.samples[number]
        rng = np.random.default_rng([self.seed, int(self.firings.latents[number]), 3])
        halves = [np.flatnonzero(sample.active), np.flatnonzero(~sample.active)]
        half = self.config.n_simulated // 2
        chosen = [rng.choice(part, min(half, len(part)), replace=False) for part in halves]
        return [self._simulation(number, explanation, int(i), sums) for i in np.concatenate(chosen)]

    def _simulation(self, number: int, explanation: str, item: int, sums: ScoreSums) -> Question:
        window = int(self.samples[number].windows[item])
        rows = self.contexts.rows(window)
        row, value = self.firings.of(number)
        actual = np.zeros(self.corpus.window, np.float64)[: len(rows)]
        inside = self.corpus.window_of[row] == window
        actual[np.searchsorted(rows, row[inside])] = value[inside]
        request = prompts.simulate(explanation, self.contexts.pieces(window), self.config.max_judgement_tokens)

        def use(answer: Answer) -> None:
            expected = np.array(answers.activations(answer, len(rows))) * self.largest[number] / 10
            sums.add_activations(number, self.corpus.group[rows], actual, expected)

        return Question(number, request, use)

    def _intruders(self, number: int, sums: ScoreSums) -> list[Question]:
        found = []
        for trial in self.samples[number].trials:
            windows = trial.windows.tolist()
            texts = [self.contexts.pieces(window) for window in windows]
            marked = [self.contexts.places(w, r) for w, r in zip(windows, trial.highlights, strict=True)]
            group = self.corpus.window_group[[windows[trial.intruder]]]

            def use(answer: Answer, n: int = len(windows), at: int = trial.intruder, group: np.ndarray = group) -> None:
                sums.add_trials(number, group, np.array([answers.choice(answer, n) == at]))

            request = prompts.intrude(texts, marked, self.config.max_judgement_tokens)
            found.append(Question(number, request, use))
        return found


def say_estimate(client: LlmClient, requests: Sequence[ChatRequest], name: str) -> None:
    """Print what requests would take, beside the budget."""
    prompt = sum(request.likely_tokens for request in requests)
    completion = sum(TYPICAL_TOKENS[request.kind] for request in requests)
    cost = f", cost about {client.budget.cost(prompt, completion):.2f}" if client.budget.prices else ""
    limits = [
        f"{limit:,} {unit}"
        for limit, unit in ((client.config.max_tokens, "tokens"), (client.config.max_cost, "cost"))
        if limit is not None
    ]
    budget = f"; budget {' and '.join(limits)}" if limits else "; no budget is set"
    print_result(
        f"estimate {name}: {len(requests):,} calls to {client.config.model}, about {prompt:,} prompt tokens and "
        f"{completion:,} tokens of answers{cost}{budget}; what is answered already costs nothing"
    )
