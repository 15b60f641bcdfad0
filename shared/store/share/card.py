"""The card of a store on the Hub: whose activations it holds, of what text, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ...core.version import thresher_version
from ..read.reader import ActivationStore


def store_card(repository: str, store: ActivationStore, license_name: str) -> str:
    """Return the `README.md` of a store, with the front matter that the Hub reads."""
    said = store.metadata
    harvest: Mapping[str, Any] = said.get("harvest") or {}
    front = {"license": license_name, "tags": ["activations", "sparse-autoencoder", "mechanistic-interpretability"]}
    held_out = int(store.held_out_contexts().sum())
    facts = {
        "model": said.get("model"),
        "model's revision": harvest.get("revision"),
        "computed in": said.get("model_dtype"),
        "text": said.get("dataset"),
        "text's revision": harvest.get("dataset_revision"),
        "rows": f"{store.n_rows:,}, in {store.n_contexts:,} contexts of {store.context_size} tokens",
        "held out": f"{held_out:,} contexts, of whole documents, for evaluation",
        "masked": f"rows of tokens {list(store.mask_token_ids)}" if store.mask_token_ids else None,
        "stored as": f"{store.manifest.header.dtype}, codec {store.codec}, Zarr v3",
    }
    hook_points = "\n".join(f"| `{name}` | {store.d_in(name):,} |" for name in store.hook_points)
    name = repository.partition("/")[2]
    return (
        "\n\n".join(
            (
                f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
                f"# {name}",
                f"Activations of a language model, written by Thresher {thresher_version()} for sparse autoencoders.",
                "\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None),
                f"| hook point | width |\n| --- | --- |\n{hook_points}",
                f"```console\nthresher store pull hf://datasets/{repository} {name}\nthresher store verify {name}\n```",
                "Arrays open in zarr-python and tensorstore, too. Every chunk has a checksum.",
            )
        )
        + "\n"
    )
