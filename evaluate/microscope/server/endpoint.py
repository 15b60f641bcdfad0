"""What an endpoint is: its address, the types of its requests, and the function that answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from .messages import NoQuery

StructType = type[msgspec.Struct]


@dataclass(frozen=True)
class Endpoint:
    """An endpoint: `answer` takes the services, then the query or the body, then what the path names.

    One that returns a job sends its result, or with `streams` all its events.
    """

    method: str
    path: str
    answer: Callable[..., Any]
    query: StructType = NoQuery
    body: StructType | None = None
    runs_model: bool = False
    streams: bool = False

    @property
    def summary(self) -> str:
        """What the endpoint does."""
        return (inspect.getdoc(self.answer) or "").splitlines()[0]
