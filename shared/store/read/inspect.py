"""The output of `thresher store info|verify|sample`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from ...core.cli import FAULTS_FOUND
from ...core.config import action_config
from ...core.errors import ConfigError, ModelError, StoreError
from ...core.terminal.progress import progress
from ...core.terminal.results import print_result
from ..config import SampleConfig, StoreConfig
from ..format.layout import ITEM_BYTES, arrays_of
from .reader import ActivationStore


def run_store_command(arguments: list[str]) -> int:
    """Run `info PATH`, `verify PATH` or `sample PATH [--contexts N] [--seed N] [--tokenizer PATH]`."""
    action, rest = arguments[0], arguments[1:]
    known: dict[str, type[StoreConfig]] = {"info": StoreConfig, "verify": StoreConfig, "sample": SampleConfig}
    if action not in known:
        raise ConfigError(f"no action '{action}'; expected one of: {', '.join(known)}, push, pull")
    missing = f"`thresher store {action}` needs the path of a store"
    config = action_config(known[action], rest, ("path",), missing, "one store and options, --key value")
    store = ActivationStore.open(config.path, verify="always")
    if action == "verify":
        return verify_store(store)
    lines = sample_store(store, config) if isinstance(config, SampleConfig) else describe_store(store)
    print_result("\n".join(lines))
    return 0


def describe_store(store: ActivationStore) -> list[str]:
    """Return the lines of `info`."""
    header = store.manifest.header
    files: dict[str, int] = {}
    for record in store.manifest.shards:
        for key, file in record.files.items():
            name = key.rsplit("/", 1)[0]
            files[name] = files.get(name, 0) + file.bytes
    state = "complete" if store.complete else "unfinished: run its harvest again to resume it"
    held_out = int(store.held_out_contexts().sum())
    n_shards = len(store.manifest.shards)
    n_bytes = sum(files.values())
    lines = [
        f"{store.path}: {state}",
        f"  rows        {store.n_rows:,}: {store.n_contexts:,} contexts of {store.context_size}, {held_out:,} held out",
        f"  training    {int(store.training_rows_per_chunk().sum()):,} rows (not held out; tokens "
        f"{list(store.mask_token_ids)} {'and rows of role placed ' if store.has_roles else ''}masked)",
        f"  stored as   {header.dtype}, codec {store.codec}; {n_shards:,} shards of {store.shard_rows:,} rows, "
        f"chunks of {store.chunk_rows:,} rows",
        f"  on disk     {n_bytes:,} bytes, {n_bytes / max(store.n_rows, 1):.1f} a token",
    ]
    if store.has_roles:
        counts = store.training_rows_by_role()
        lines.insert(3, "  by role     " + ", ".join(f"{name} {n:,}" for name, n in counts.items() if n))
    for name in store.hook_points:
        moments = store.moments(name)
        stored = files.get(name, 0) + files.get(f"scales/{name}", 0)
        raw = store.n_rows * store.d_in(name) * ITEM_BYTES[header.dtype]
        lines += [
            f"  {name}: d_in {store.d_in(name)}, {stored / max(store.n_rows, 1):.1f} bytes a token, "
            f"{stored / max(raw, 1):.3f} of raw {header.dtype}",
            f"      mean norm {moments.mean_norm:.4g}, total variance {moments.total_variance:.4g}, "
            f"norm of the mean {np.linalg.norm(moments.mean):.4g}",
        ]
    others = {name: n for name, n in files.items() if name not in store.hook_points and not name.startswith("scales/")}
    lines += [f"  {name}: {n / max(store.n_rows, 1):.2f} bytes a token" for name, n in others.items()]
    if store.metadata:
        lines += ["  metadata:"] + [f"      {key} = {value!r}" for key, value in store.metadata.items()]
    return lines


def verify_store(store: ActivationStore) -> int:
    """Check the whole store, with a progress bar; print each fault; return 1 if there is one."""
    header = store.manifest.header
    keys = {array.shard_key(record.shard) for array in arrays_of(header) for record in store.manifest.shards}
    total = sum(file.bytes for record in store.manifest.shards for key, file in record.files.items() if key in keys)
    with progress(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        faults = store.verify(bar.update)
    for fault in faults:
        print_result(" ".join(fault.split()))
    state = "complete" if store.complete else "unfinished"
    n = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
    print_result(f"{store.path}: {state}, {store.n_rows:,} rows, {total:,} bytes of data checked, {n}")
    return FAULTS_FOUND if faults else 0


def sample_store(store: ActivationStore, config: SampleConfig) -> list[str]:
    """Return some contexts as text, with the norms of their rows at each hook point."""
    n = min(config.contexts, store.n_contexts)
    rng = np.random.default_rng(config.seed)
    held_out = store.held_out_contexts()
    tokenizer = _tokenizer(store, config.tokenizer)
    lines = []
    for context in np.sort(rng.choice(store.n_contexts, n, replace=False)).tolist():
        start, stop = context * store.context_size, (context + 1) * store.context_size
        documents, positions = store.documents(start, stop)
        first = int(documents[0])
        name = store.document_info(first)[1] if first >= 0 else None
        where = f", document {first} ({name or 'no name'}) from position {positions[0]}" if first >= 0 else ""
        lines.append(f"context {context}{' (held out)' if held_out[context] else ''}{where}")
        for hook_point in store.hook_points:
            norms = store.read(hook_point, start, stop).double().norm(dim=1)
            lines.append(
                f"  {hook_point}: norms of mean {norms.mean():.4g}, least {norms.min():.4g}, most {norms.max():.4g} "
                f"at position {int(norms.argmax())}"
            )
        tokens = store.tokens(start, stop)
        if tokens is not None:
            text = repr(tokenizer.decode(tokens.tolist())) if tokenizer else " ".join(map(str, tokens.tolist()))
            lines.append(f"  {text}")
    return lines


def _tokenizer(store: ActivationStore, path: str | None) -> Any:
    """Return the tokenizer named, or the store's own where it can be loaded without a network; else None."""
    if not store.has_tokens:
        return None
    from transformers import AutoTokenizer

    from ...model.language_model import load_tokenizer
    from ...model.loading.tokenizer_files import vocabulary_files
    from .stored_tokenizer import load_stored_tokenizer

    if path is not None:
        return load_tokenizer(path)
    with suppress(StoreError, ModelError):
        if (stored := load_stored_tokenizer(store)) is not None:
            return stored
    name = str(store.metadata.get("tokenizer") or store.metadata.get("model") or "")
    if not vocabulary_files(name):
        return None
    with suppress(OSError, ValueError):
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    return None
