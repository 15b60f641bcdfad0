"""The `thresher init` subcommand: write the configuration of a first run, with an estimate of what it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from msgspec import Meta

from thresher.shared.core.cli import asks_for_help, run_guarded, stage_help
from thresher.shared.core.config import Config, Device, parse_arguments, read_toml, to_config
from thresher.shared.core.errors import ConfigError
from thresher.shared.core.lazy import fast_imports

SUMMARY = "Write configurations for your model and text, with an estimate of disk, time and memory."
_COMMAND_LINE = "command line"


class InitConfig(Config, frozen=True, kw_only=True):
    """What a first run is about; on a terminal, `thresher init` asks for what is missing."""

    model: Annotated[str, Meta(description="Folder or Hugging Face id of the language model; stdlib-lm is bundled.")]
    dataset: Annotated[
        str, Meta(description="python-stdlib; a file or folder of text; or a Hugging Face dataset (docs/text.md).")
    ]
    tokens: Annotated[int, Meta(ge=1, description="Budget: tokens to harvest and to train on.")]
    output: Annotated[str, Meta(min_length=1, description="Folder for the configurations and what they make.")]
    hook_points: Annotated[
        Annotated[list[str], Meta(min_length=1)] | None,
        Meta(description="Hook points to read (default: the residual stream after the middle block)."),
    ] = None
    d_sae: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="Number of latents (default: 8 times the width).")
    ] = None
    context_size: Annotated[int, Meta(ge=2, description="Tokens per context.")] = 256
    holdout: Annotated[
        Literal["documents", "contexts"],
        Meta(description="What to hold out from training: documents, or runs of contexts for text with few documents."),
    ] = "documents"
    device: Device = "auto"
    measure: Annotated[
        bool, Meta(description="Measure speed, size and memory with a short trial; false on a machine without the GPU.")
    ] = True


CONFIG = InitConfig
_QUESTIONS = {
    "model": ("Model: a folder or a Hugging Face id", "stdlib-lm"),
    "dataset": ("Text: a file, a folder or a Hugging Face dataset", "python-stdlib"),
    "tokens": ("Budget: tokens to harvest and to train on", "1_000_000"),
    "output": ("Folder for configurations and results", "runs/first"),
}


def main(arguments: list[str]) -> int:
    """Write the configurations and return the exit code."""
    if asks_for_help(arguments):
        return run_guarded(lambda: print(stage_help("init", InitConfig, SUMMARY), flush=True))
    return run_guarded(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    path, given = parse_arguments(InitConfig, arguments)
    values = (read_toml(path) if path else {}) | given
    if sys.stdin.isatty() and sys.stdout.isatty():
        values = completed_by(_ask, values)
    config = to_config(InitConfig, values, path or _COMMAND_LINE, given)
    started = time.monotonic()
    with fast_imports():
        from thresher.first_run import write_first_run  # here, so that --help stays quick
    write_first_run(config, time.monotonic() - started)


def completed_by(ask: Callable[[str], str], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with answers to the questions that they leave open; an empty answer is the one in brackets."""
    answers: dict[str, Any] = {}
    for key, (question, default) in _QUESTIONS.items():
        if key not in values:
            answer = ask(f"{question} [{default}]: ").strip() or default
            answers |= parse_arguments(InitConfig, [f"--{key}={answer}"])[1]
    return values | answers


def _ask(question: str) -> str:
    try:
        return input(question)
    except EOFError:
        raise ConfigError("the questions were not answered; answer them, or give --model, --dataset, ...") from None
