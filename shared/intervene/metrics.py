"""Metrics that interventions are judged by: functions of a run's logits with one number per text.

A metric is a `Metric`, or any function of logits `[batch, context, vocabulary]` that returns `[batch]` and treats each
text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..core.errors import InterventionError
from .run import Run
from .texts import one_token

Logits = Float[Tensor, "batch context vocabulary"]
Token = str | int


class Metric:
    """A metric that needs to know more than the logits, such as the tokens of the texts or the clean run's logits."""

    flat_at_clean = False
    """Whether the metric's gradient is zero at the clean run, so that only integrated gradients say something."""

    def values(self, run: Run, logits: Logits, texts: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the metric of each row of logits; `texts` are the numbers of their texts in the run."""
        raise NotImplementedError


MetricLike = Metric | Callable[[Logits], Tensor]


@dataclass(frozen=True)
class LogitDifference(Metric):
    """The logit of one token minus that of another after position `at`, by default after each text's last token.

    Tokens are texts of one token each, or ids; a list gives one token for each text of the batch.
    """

    right: Token | Sequence[Token]
    wrong: Token | Sequence[Token]
    at: int = -1

    def values(self, run: Run, logits: Logits, texts: Tensor) -> Tensor:
        right, wrong = (_tokens(run, tokens)[texts].to(logits.device) for tokens in (self.right, self.wrong))
        rows = torch.arange(len(logits), device=logits.device)
        last = logits[rows, _position(run, self.at)[texts].to(logits.device)]
        return last[rows, right] - last[rows, wrong]


@dataclass(frozen=True)
class LogProbability(Metric):
    """The log-probability of what follows position `start`, as far as the text goes: the sum over its tokens in nats.

    Without `start`, that of the continuation that `SaeModel.run` was given. With `token`, that of one token after the
    text's last.
    """

    token: Token | Sequence[Token] | None = None
    start: int | None = None
    mean: bool = False

    def values(self, run: Run, logits: Logits, texts: Tensor) -> Tensor:
        log_probs = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        log_probs = log_probs.log_softmax(dim=-1)
        rows = torch.arange(len(logits), device=logits.device)
        if self.token is not None:
            last = log_probs[rows, _position(run, -1)[texts].to(logits.device)]
            return last[rows, _tokens(run, self.token)[texts].to(logits.device)]
        start = self._starts(run)[texts].to(logits.device)
        tokens, lengths = run.tokens[texts].to(logits.device), run.lengths[texts].to(logits.device)
        each = log_probs[:, :-1].gather(2, tokens[:, 1:, None])[:, :, 0]
        position = torch.arange(1, tokens.shape[1], device=logits.device)
        counted = (position >= start[:, None]) & (position < lengths[:, None])
        total = torch.where(counted, each, 0).sum(dim=1)
        return total / counted.sum(dim=1).clamp_min(1) if self.mean else total

    def _starts(self, run: Run) -> Tensor:
        if self.start is not None:
            return torch.where(torch.tensor(self.start >= 0), self.start, run.lengths + self.start)
        if run.prompt_lengths is None:
            raise InterventionError(
                "LogProbability() needs a continuation: run(prompt, continuation=...), or a token, or a start"
            )
        return run.prompt_lengths


@dataclass(frozen=True)
class KLDivergence(Metric):
    """KL(clean || edited) of the next token in nats, averaged over each text's tokens."""

    flat_at_clean = True

    def values(self, run: Run, logits: Logits, texts: Tensor) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_clean = run.logits[texts].to(logits.device, wide).log_softmax(dim=-1)
        each = (log_clean.exp() * (log_clean - logits.to(wide).log_softmax(dim=-1))).sum(dim=-1)
        lengths = run.lengths[texts].to(logits.device)
        counted = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
        return torch.where(counted, each, 0).sum(dim=1) / lengths


def evaluate_metric(
    metric: MetricLike, run: Run, logits: Logits, texts: Int64[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return a metric of each row of logits, which belong to the texts of these numbers.

    Raises:
        InterventionError: it is not one number per text.
    """
    found = metric.values(run, logits, texts) if isinstance(metric, Metric) else metric(logits)
    if not isinstance(found, Tensor) or found.numel() != len(logits):
        got = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InterventionError(f"the metric returned {got}; expected one number for each of the {len(logits)} texts")
    return found.reshape(len(logits))


def _tokens(run: Run, tokens: Token | Sequence[Token]) -> Int64[Tensor, " texts"]:
    """Return one token for each text of a run."""
    listed = [tokens] * len(run) if isinstance(tokens, (str, int)) else list(tokens)
    if len(listed) != len(run):
        raise InterventionError(
            f"the metric names {len(listed)} tokens for {len(run)} texts; give one, or one for each"
        )
    ids = [one_token(token, run.tokenizer) for token in listed]
    vocabulary = run.logits.shape[-1]
    if not all(0 <= token < vocabulary for token in ids):
        raise InterventionError(f"the metric names token {max(ids)}; the model has {vocabulary:,} from 0 on")
    return torch.tensor(ids)


def _position(run: Run, at: int) -> Int64[Tensor, " texts"]:
    """Return a position of each text, counted from its end where `at` is negative."""
    position = run.lengths + at if at < 0 else torch.full_like(run.lengths, at)
    if bool(((position < 0) | (position >= run.lengths)).any()):
        raise InterventionError(
            f"position {at} is outside of a text of {int(run.lengths.min())} tokens; give one that each text has"
        )
    return position
