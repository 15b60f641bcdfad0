"""One thread that runs the model for all requests, one after another: they queue, have limits and may be cancelled."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

from ....shared.core.errors import InterventionError, ThresherError

_log = logging.getLogger(__name__)
ModelT = TypeVar("ModelT")
Event = dict[str, Any]


class QueueFullError(ThresherError, RuntimeError):
    """More requests wait for the model than are allowed."""


class CancelledJobError(Exception):
    """The one who asked has gone."""


class Job:
    """One request's work on the worker's thread, and what it says as it goes, read by the request's task.

    `check` is to be called between the steps of long work.
    """

    def __init__(self, work: Callable[[Any, Job], Any], seconds: float):
        self._work, self._seconds = work, seconds
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[Event | None] = asyncio.Queue()
        self._gone = threading.Event()
        self._until = float("inf")
        self.result: Any = None

    def run(self, model: Any) -> None:
        """Do the work; what goes wrong becomes an `error` event."""
        self._until = time.monotonic() + self._seconds
        try:
            self.check()
            self.result = self._work(model, self)
            self.say("done", **(self.result if isinstance(self.result, dict) else {}))
        except CancelledJobError:
            pass
        except ThresherError as error:
            self.fail(" ".join(str(error).split()))
        except Exception:
            _log.exception("a request to the model failed")
            self.fail("the microscope failed on this request; its log says why")
        finally:
            self._put(None)

    def check(self) -> None:
        """Stop the work if nobody waits for it, or if it takes too long."""
        if self._gone.is_set():
            raise CancelledJobError
        if time.monotonic() > self._until:
            raise InterventionError(
                f"this took longer than {self._seconds:g} s, the limit of one request; ask for less, or start the "
                "microscope with a larger --max_seconds"
            )

    def say(self, event: str, **content: Any) -> None:
        """Send an event to the request."""
        self._put({"event": event} | content)

    def fail(self, reason: str) -> None:
        """Send an error, and end."""
        self._put({"event": "error", "error": reason})

    def cancel(self) -> None:
        """Let the work stop at its next check."""
        self._gone.set()

    async def events(self) -> AsyncIterator[Event]:
        """Yield what the job says until it has ended; whoever stops reading cancels it."""
        try:
            while (event := await self._said.get()) is not None:
                yield event
        finally:
            self.cancel()

    def _put(self, event: Event | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._said.put_nowait, event)
        except RuntimeError:  # the server has ended
            self._gone.set()


class ModelWorker(threading.Thread, Generic[ModelT]):
    """The thread with the model, which it loads first. If that fails, every job ends with the reason.

    Attributes:
        state: "loading", "ready" or "missing".
        reason: why the model is missing.
    """

    def __init__(self, load: Callable[[], ModelT], seconds: float, max_waiting: int):
        super().__init__(name="model", daemon=True)
        self._load, self._seconds, self._max_waiting = load, seconds, max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._ended = False
        self.state, self.reason = "loading", ""
        self.model: ModelT | None = None

    def submit(self, work: Callable[[ModelT, Job], Any]) -> Job:
        """Queue some work, from a request's task.

        Raises:
            QueueFullError: too many wait already.
            InterventionError: there is no model.
        """
        with self._changed:
            if self.state == "missing":
                raise InterventionError(f"the model is not there: {self.reason}")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests wait for the model already; try again later")
            job = Job(work, self._seconds)
            ahead = len(self._waiting) + (self._running is not None)
            if ahead or self.state == "loading":
                job.say("queued", ahead=ahead, state=self.state)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def status(self) -> dict[str, Any]:
        """Return what the page says of the model."""
        with self._changed:
            waiting, running = len(self._waiting), self._running is not None
            return {"state": self.state, "reason": self.reason, "waiting": waiting, "running": running}

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return self._running is not None or bool(self._waiting)

    def stop(self) -> None:
        """End after the current job, which is cancelled."""
        with self._changed:
            self._ended = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify()

    def run(self) -> None:
        try:
            self.model = self._load()
            self._set("ready", "")
        except ThresherError as error:
            self._set("missing", " ".join(str(error).split()))
        except Exception as error:  # a library's: browsing goes on
            _log.exception("the model cannot be loaded")
            self._set("missing", f"{type(error).__name__}: {error}")
        while (job := self._next()) is not None:
            if self.state == "missing":
                job.fail(f"the model is not there: {self.reason}")
                job._put(None)
            else:
                job.run(self.model)

    def _set(self, state: str, reason: str) -> None:
        with self._changed:
            self.state, self.reason = state, reason

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            while not self._waiting and not self._ended:
                self._changed.wait()
            if self._ended:
                return None
            self._running = self._waiting.popleft()
            return self._running
