"""The `thresher store` subcommand: describe, verify, sample, import, upload or download a store."""

from __future__ import annotations

from ..core.config import Config

SUMMARY = "Show, verify, sample, import, upload or download an activation store."
USAGE = """usage: thresher store info PATH
       thresher store verify PATH
       thresher store sample PATH [--contexts N] [--seed N] [--tokenizer PATH]
       thresher store import SOURCE --store OUT [--key value ...]
       thresher store push FOLDER --repo USER/NAME [--license NAME] [--private]
       thresher store pull hf://datasets/USER/NAME@revision FOLDER

Show what a store holds; check every checksum in it; print some contexts with the norms of their rows; write a store of
activations that SAELens, saev, Llamascopium, crosslayer-coding or vLLM cached, or of safetensors files (`thresher store
import --help`, docs/importing.md); upload a store to the Hugging Face Hub or download one. The same command resumes
after an interruption.
PATH is a folder, or a URL such as s3://bucket/prefix (docs/object-stores.md).
"""


def actions() -> dict[str, type[Config]]:
    """Return the options of each action."""
    from .config import PullStoreConfig, PushStoreConfig, SampleConfig, StoreConfig
    from .foreign.config import ImportConfig

    return {
        "info": StoreConfig,
        "verify": StoreConfig,
        "sample": SampleConfig,
        "import": ImportConfig,
        "push": PushStoreConfig,
        "pull": PullStoreConfig,
    }


def main(arguments: list[str]) -> int:
    """Run an action and return the exit code."""
    from ..core.cli import asks_for_help, run_guarded

    if arguments[:1] == ["import"] and asks_for_help(arguments):
        return run_guarded(_print_import_help)
    if not arguments or asks_for_help(arguments):
        print(USAGE, end="")
        return 0 if arguments else 2

    def run() -> int:
        if arguments[0] in ("push", "pull"):
            from .share.actions import run_hub_command

            return run_hub_command(arguments)
        if arguments[0] == "import":
            from .foreign.run import run_import_command

            return run_import_command(arguments)
        from .read.inspect import run_store_command  # imported here to keep --help fast

        return run_store_command(arguments)

    return run_guarded(run)


def _print_import_help() -> None:
    from ..core.config import help_text
    from .foreign.config import ImportConfig

    print("usage: thresher store import SOURCE --store OUT [--key value ...]\n")
    print("Write a store of activations that another program cached (docs/importing.md).\n")
    print(help_text(ImportConfig))
