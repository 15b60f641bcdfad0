"""What a run may spend, and how fast it may ask."""

from __future__ import annotations

import threading
import time

from .config import LlmConfig
from .request import Answer, ChatRequest


class Budget:
    """Counts tokens and cost, and refuses a request that could exceed the budget.

    Before a request is sent, the most that it can take is reserved; its answer replaces that by what it took.
    """

    def __init__(self, config: LlmConfig):
        self.max_tokens, self.max_cost = config.max_tokens, config.max_cost
        self.prices = None
        if config.input_price is not None and config.output_price is not None:
            self.prices = (config.input_price / 1e6, config.output_price / 1e6)
        self.prompt_tokens = self.completion_tokens = 0
        self._reserved: list[ChatRequest] = []
        self._changed = threading.Condition()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of some tokens; 0 without prices."""
        return prompt_tokens * self.prices[0] + completion_tokens * self.prices[1] if self.prices else 0.0

    def reserve(self, request: ChatRequest, stop: threading.Event) -> bool:
        """Wait until a request fits beside those in flight; return False if it does not fit without them either."""
        with self._changed:
            while not self._fits([*self._reserved, request]):
                if not self._reserved or stop.is_set():
                    return False
                self._changed.wait(0.1)
            self._reserved.append(request)
            return True

    def settle(self, request: ChatRequest, answer: Answer | None, sent: bool = True) -> None:
        """Replace a reservation by what the answer took.

        A request that got no answer counts in full if it was sent, because the server may have answered it.
        """
        with self._changed:
            self._reserved.remove(request)
            if sent:
                self._count(request, answer)
            self._changed.notify_all()

    def count(self, request: ChatRequest, answer: Answer) -> bool:
        """Count an answer that was paid earlier, as if it were paid now; return False if the budget is exhausted."""
        with self._changed:
            self._count(request, answer)
            return self._fits([])

    def _count(self, request: ChatRequest, answer: Answer | None) -> None:
        prompt = None if answer is None else answer.prompt_tokens
        completion = None if answer is None else answer.completion_tokens
        self.prompt_tokens += request.most_tokens if prompt is None else prompt
        self.completion_tokens += request.max_tokens if completion is None else completion

    def _fits(self, reserved: list[ChatRequest]) -> bool:
        prompt = self.prompt_tokens + sum(request.most_tokens for request in reserved)
        completion = self.completion_tokens + sum(request.max_tokens for request in reserved)
        return (self.max_tokens is None or prompt + completion <= self.max_tokens) and (
            self.max_cost is None or self.cost(prompt, completion) <= self.max_cost
        )

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens + self.completion_tokens:,} tokens"
        return f"{tokens}, cost {self.cost(self.prompt_tokens, self.completion_tokens):.4f}" if self.prices else tokens


class RateLimit:
    """Spaces requests evenly, so that no minute has more requests or tokens than allowed."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None):
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next = self._pause_ends = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int, stop: threading.Event) -> None:
        """Wait for the turn of a request of about so many tokens, or until `stop` is set."""
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + max(self._per_request, tokens * self._per_token)
        while not stop.is_set():
            with self._lock:  # a pause that began meanwhile holds for waiting requests as well
                left = max(at, self._pause_ends) - time.monotonic()
            if left <= 0:
                return
            stop.wait(left)

    def pause(self, seconds: float) -> None:
        """Send nothing for some seconds, because the server asked for that."""
        with self._lock:
            self._pause_ends = max(self._pause_ends, time.monotonic() + seconds)
            self._next = max(self._next, self._pause_ends)
