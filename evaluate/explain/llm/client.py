"""Send requests to an OpenAI-compatible server: from the cache where answered, in parallel, within limits."""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

from ....shared.core.errors import ConfigError, LlmError, one_line
from ....shared.core.terminal.progress import ProgressLines
from ....shared.core.terminal.progress import progress as show_progress
from .cache import AnswerCache
from .config import LlmConfig
from .limits import Budget, RateLimit
from .request import Answer, ChatRequest

LONGEST_BACKOFF = 60.0
HIDDEN = "[key]"
_RETRIED = (408, 409, 429)


class LlmClient:
    """Answers requests. `exhausted` says whether the budget kept it from sending some.

    Raises:
        ConfigError: the openai package or the environment variable of the key is missing.
    """

    def __init__(self, config: LlmConfig, cache: AnswerCache, seed: int):
        self.config, self.cache, self.seed = config, cache, seed
        self.budget = Budget(config)
        self.exhausted = False
        self.n_sent = self.n_cached = 0
        self._rate = RateLimit(config.requests_per_minute, config.tokens_per_minute)
        self._stop = threading.Event()
        self._key = _read_key(config)
        self._client = _open(config, self._key)

    def close(self) -> None:
        """Close the connections to the server."""
        self._client.close()

    def digest(self, request: ChatRequest) -> str:
        """Return the hash that a request's answer is kept under."""
        return request.digest(self.config.base_url.rstrip("/"), self.config.model, self.config.temperature, self.seed)

    def ask(self, requests: Sequence[ChatRequest], desc: str) -> list[Answer | None]:
        """Return the answer to each request, or None where the budget did not allow it.

        Answers are kept as they come. A signal or an error ends the threads after the answers to what they have sent.

        Raises:
            LlmError: the server refuses a request, or does not answer one after all retries.
        """
        digests = [self.digest(request) for request in requests]
        found: dict[str, Answer | None] = {}
        with show_progress(total=len(requests), unit="call", desc=desc) as bar:
            for digest, request in zip(digests, requests, strict=True):
                if digest not in found and (answer := self.cache.get(digest)) is not None:
                    found[digest] = answer
                    self.n_cached += 1
                    self.exhausted |= not self.budget.count(request, answer)
            waiting = {digest: request for digest, request in zip(digests, requests, strict=True)}
            waiting = {digest: request for digest, request in waiting.items() if digest not in found}
            self._show(bar, len(requests) - len(waiting))
            if waiting and not self.exhausted:
                found |= self._send_all(waiting, bar)
        return [found.get(digest) for digest in digests]

    def _send_all(self, waiting: dict[str, ChatRequest], bar: Any) -> dict[str, Answer | None]:
        found: dict[str, Answer | None] = {}
        self._stop.clear()
        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="llm") as pool:
            sent = {pool.submit(self._send, digest, request): digest for digest, request in waiting.items()}
            try:
                for future in as_completed(sent):
                    found[sent[future]] = future.result()
                    self._show(bar, 1 if found[sent[future]] is not None else 0)
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return found

    def _show(self, bar: Any, n: int) -> None:
        bar.set_postfix_str(str(self.budget), refresh=False)
        if n or isinstance(bar, ProgressLines):
            bar.update(n)

    def _send(self, digest: str, request: ChatRequest) -> Answer | None:
        """Send a request until it is answered, and keep the answer."""
        for attempt in range(self.config.retries + 1):
            if self._stop.is_set() or self.exhausted:
                return None
            if not self.budget.reserve(request, self._stop):
                self.exhausted |= not self._stop.is_set()
                return None
            self._rate.wait(request.likely_tokens + request.max_tokens, self._stop)
            if self._stop.is_set():
                self.budget.settle(request, None, sent=False)
                return None
            self.n_sent += 1
            answer, failure, delay, sent = None, "", None, True
            try:
                answer, failure, delay, sent = self._try(request)
                if answer is not None:
                    self.cache.put(digest, request.kind, answer)
                    return answer
            finally:
                self.budget.settle(request, answer, sent)
            if attempt == self.config.retries:
                raise LlmError(
                    f"no answer from {self.config.base_url} after {attempt + 1} tries ({failure}); see that the server "
                    "runs, then run the same command again: what is answered is kept"
                )
            if delay is not None:
                self._rate.pause(delay)
            else:
                wait = min(self.config.backoff * 2**attempt, LONGEST_BACKOFF)
                self._stop.wait(wait * random.uniform(0.5, 1.0))
        return None

    def _try(self, request: ChatRequest) -> tuple[Answer | None, str, float | None, bool]:
        """Send a request once.

        Return the answer, or else what failed, the seconds that the server asks to wait, and whether it may have
        answered nevertheless.
        """
        import openai

        failure: Exception
        try:
            response = self._client.chat.completions.create(
                model=self.config.model,
                messages=request.messages,
                max_tokens=request.max_tokens,
                temperature=self.config.temperature,
                seed=self.seed,
            )
            return self._answer(response), "the response is not a chat completion", None, True
        except openai.APIStatusError as error:
            if error.code == "content_filter":
                return Answer("", "content_filter", True, 0, 0), "", None, True
            if error.status_code < 500 and (error.status_code not in _RETRIED or error.code == "insufficient_quota"):
                raise LlmError(
                    f"{self.config.base_url} refused a request to '{self.config.model}' (HTTP {error.status_code}: "
                    f"{self._hide(one_line(error))}); correct base_url, model, the key or the limits"
                ) from None
            return None, f"HTTP {error.status_code}", retry_after(error.response.headers.get("retry-after")), False
        except openai.APIConnectionError as error:  # includes timeouts
            sent = type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")
            return None, self._hide(one_line(error)), None, sent
        except (openai.APIError, ValueError) as error:  # a body that is not JSON
            failure = error
        return None, self._hide(one_line(failure)), None, True

    def _answer(self, response: Any) -> Answer | None:
        choices = getattr(response, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        if choice is None or message is None:
            return None
        usage = getattr(response, "usage", None)
        tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt, completion = (n if isinstance(n, int) else None for n in tokens)
        refusal = getattr(message, "refusal", None)
        reason = str(choice.finish_reason or "stop")
        refused = bool(refusal) or reason == "content_filter"
        return Answer(self._hide(str(refusal or message.content or "")), reason, refused, prompt, completion)

    def _hide(self, text: str) -> str:
        """Return a server's text without the key, which some servers repeat."""
        return text.replace(self._key, HIDDEN) if self._key else text


def _read_key(config: LlmConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {config.api_key_env}, which api_key_env names, is not set; set it")
    return key


def _open(config: LlmConfig, key: str | None) -> Any:
    try:
        import openai
    except ImportError:
        raise ConfigError("an [llm] table needs the openai package; run pip install 'thresher[explain]'") from None
    client = openai.OpenAI(
        base_url=config.base_url,
        api_key=key or "none",
        timeout=config.timeout,
        max_retries=0,  # because the limits hold for every try
    )
    client.organization = client.project = None  # which the library takes from the environment
    return client


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks to wait: a number, or the time until a date; else None."""
    if header is None:
        return None
    with suppress(ValueError):
        return max(float(header), 0.0)
    with suppress(ValueError):
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    return None
