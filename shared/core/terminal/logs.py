"""How the messages of a command appear: as text, or as one JSON object per line.

Modules log to `logging.getLogger(__name__)`. Nothing is configured on import, so that a program that imports Thresher
decides what becomes of its messages; only the command line enters `shown_logs`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..config import Config, load_config

ROOT_LOGGER = "thresher"
_LIBRARY_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


class LogSettings(Config, frozen=True, kw_only=True):
    """The options that every command takes."""

    quiet: Annotated[bool, Meta(description="Show only warnings, errors and results, and no progress.")] = False
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="Format of messages, progress and results; json is one object per line, for log collectors."),
    ] = "text"

    def arguments(self) -> list[str]:
        """Return the flags that give another `thresher` command these settings."""
        return ["--quiet"] * self.quiet + ["--log_format", self.log_format]


_settings: LogSettings | None = None
_handler: logging.Handler | None = None


def take_log_flags(arguments: list[str]) -> tuple[LogSettings, list[str]]:
    """Return the settings that a command line gives, and its other arguments.

    Raises:
        ConfigError: a value is missing or unknown.
    """
    own, others = [], []
    rest = list(reversed(arguments))
    while rest:
        argument = rest.pop()
        key, given, _ = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not argument.startswith("--") or key not in LogSettings.__struct_fields__:
            others.append(argument)
            continue
        own.append(argument)
        if not given and rest and (key != "quiet" or rest[-1].lower() in ("true", "false")):
            own.append(rest.pop())
    return load_config(LogSettings, None, own), others


def log_settings() -> LogSettings | None:
    """Return the settings of the command that runs in this process; None in a program that imports Thresher."""
    return _settings


@contextmanager
def shown_logs(settings: LogSettings) -> Iterator[None]:
    """Write the messages of the block to stderr; in a block inside another, the inner settings hold.

    With `log_format` json, other libraries' warnings and Python's become objects too.
    """
    global _settings, _handler
    as_json = settings.log_format == "json"
    package, root = logging.getLogger(ROOT_LOGGER), logging.getLogger()
    before, outer, level = _settings, _handler, package.level
    _settings, _handler = settings, _StderrHandler(JsonFormatter() if as_json else TextFormatter())
    target = root if as_json else package
    outer_target = root if outer in root.handlers else package
    if outer is not None:
        outer_target.removeHandler(outer)
    target.addHandler(_handler)
    package.setLevel(logging.WARNING if settings.quiet else logging.INFO)
    if as_json:
        logging.captureWarnings(True)
    if as_json or settings.quiet:
        for name in _LIBRARY_BARS:  # read when those libraries are imported
            os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        target.removeHandler(_handler)
        if outer is not None:
            outer_target.addHandler(outer)
        _settings, _handler = before, outer
        package.setLevel(level)
        if as_json:
            logging.captureWarnings(False)


def adopt_library_logs() -> None:
    """Let libraries that print their own messages hand them to this command's log, if it is in JSON.

    transformers, datasets and huggingface_hub add a handler of their own when they are imported.
    """
    if _settings is None or _settings.log_format != "json":
        return
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and "." not in name and name != ROOT_LOGGER and logger.handlers:
            for handler in list(logger.handlers):
                if type(handler) is logging.StreamHandler:
                    logger.removeHandler(handler)
            logger.propagate = True


def json_line(level: str, logger: str, message: str, moment: float | None = None, **fields: Any) -> str:
    """Return a message as a JSON object; `moment` is in seconds since 1970, by default now.

    Under a launcher such as `torchrun`, the object also has the rank of this process.
    """
    moment = time.time() if moment is None else moment
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03d}Z"
    rank = {"rank": int(os.environ["RANK"])} if os.environ.get("RANK", "").isdigit() else {}
    line = {"time": at, "level": level, "logger": logger, "message": message, **rank, **fields}
    return json.dumps(line, default=str, ensure_ascii=False)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, and the record's `fields` and traceback, if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_line(record.levelname.lower(), record.name, record.getMessage(), record.created, **fields)


class TextFormatter(logging.Formatter):
    """The message; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text, with its traceback if it has one."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{'warning' if record.levelno < logging.ERROR else 'error'}: {text}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at the time, above the bars that are on it."""

    def __init__(self, formatter: logging.Formatter):
        super().__init__()
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record), sys.stderr)


def write_line(text: str, stream: Any) -> None:
    """Write a line to stdout or stderr without breaking a progress bar."""
    bars = sys.modules.get("tqdm")  # without it there are no bars
    if bars is not None:
        bars.tqdm.write(text, file=stream)
    else:
        stream.write(text + "\n")
    stream.flush()
