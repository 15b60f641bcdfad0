"""The `thresher hooks` subcommand: which canonical hook points a model has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from ..config import Config, Device, describe, load_config
from ..errors import ConfigError

SUMMARY = "List a model's hook points: width, module, and what was measured."


class HooksConfig(Config, frozen=True, kw_only=True):
    """The model and how it is loaded, as for a harvest."""

    model: Annotated[str, Meta(description="Folder or Hugging Face id of the language model.")]
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="Data type the model runs in; auto is bfloat16 where the device has it."),
    ] = "auto"
    device: Device = "auto"
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of the model.")] = None
    adapter: Annotated[
        str | None, Meta(description="Folder or Hugging Face id of a PEFT adapter to merge into the model.")
    ] = None
    trust_remote_code: Annotated[bool, Meta(description="Run Python code that comes with the model.")] = False
    attn_implementation: Annotated[
        str | None, Meta(description="How attention is computed: eager, sdpa, flash_attention_2, ...")
    ] = None


def main(arguments: list[str]) -> int:
    """Print the hook points of the model that the first argument names, and return the exit code."""
    from ..cli import run_guarded

    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"usage: thresher hooks MODEL [--key value ...]\n\n{SUMMARY}\n\n{describe(HooksConfig)}")
        return 0 if arguments else 2

    def run() -> Any:
        config = _config(arguments)
        from ..lazy import importing

        with importing():
            from .table import print_hook_points  # here, so that --help stays quick

            print_hook_points(config)

    return run_guarded(run)


def _config(arguments: list[str]) -> HooksConfig:
    named = not arguments[0].startswith("-")
    if named and arguments[0].endswith(".toml"):
        raise ConfigError(f"'{arguments[0]}' is a config file; expected the model itself: thresher hooks MODEL")
    return load_config(HooksConfig, None, ["--model", *arguments] if named else arguments)
