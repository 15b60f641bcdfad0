"""A question to a language model, its hash, and the answer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

BYTES_PER_TOKEN = 3.5
"""Of prompts, about: English and code have more, other scripts fewer."""
TOKENS_PER_MESSAGE = 32
"""What a chat template adds to a message, at most."""


@dataclass(frozen=True)
class ChatRequest:
    """A system message, a user message, and the most tokens of the answer; `kind` says what is asked."""

    kind: str
    system: str
    user: str
    max_tokens: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages, as the API takes them."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    @property
    def n_bytes(self) -> int:
        """The bytes of the messages."""
        return len(self.system.encode()) + len(self.user.encode())

    @property
    def likely_tokens(self) -> int:
        """An estimate of the prompt's tokens."""
        return round(self.n_bytes / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE

    @property
    def most_tokens(self) -> int:
        """More tokens than the prompt can have: a token has at least one byte."""
        return self.n_bytes + 2 * TOKENS_PER_MESSAGE

    def digest(self, *settings: object) -> str:
        """Return the SHA-256 of the request and of the settings that it is sent with, in hexadecimal."""
        content = json.dumps([settings, self.messages, self.max_tokens], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came back. The numbers of tokens are the server's, or None if it did not say."""

    text: str
    finish_reason: str
    refusal: bool
    prompt_tokens: int | None
    completion_tokens: int | None
