"""`thresher store import`: write a store of another program's activations."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

from ...core.config import action_config
from ...core.errors import ConfigError, MissingFileError, StoreError
from ...core.interrupt import Interrupt
from ...core.location import StoreUrl, locate
from ...core.paths import user_path
from ...core.terminal.progress import progress
from ..format.layout import ITEM_BYTES
from ..read.open import find_manifest
from ..write.writer import ActivationStoreWriter
from . import crosslayer, llamascopium, saelens, saev, tensor_folder, vllm
from .config import DEFAULT_CONTEXT, ImportConfig
from .contexts import Contexts
from .source import Format, Options, Source, digest

_log = logging.getLogger(__name__)

FOREIGN_FORMATS = (
    saev.FORMAT,
    saelens.FORMAT,
    crosslayer.FORMAT,
    llamascopium.FORMAT,
    vllm.FORMAT,
    tensor_folder.FORMAT,
)
"""The formats, those that are told apart most surely first."""
BATCH_BYTES = 32 << 20


def run_import_command(arguments: list[str]) -> int:
    """Run `import SOURCE --store OUT`."""
    missing = "`thresher store import` needs the folder or file to read first"
    config = action_config(ImportConfig, arguments[1:], ("source",), missing, "one source and options, --key value")
    import_store(config)
    return 0


def import_store(config: ImportConfig) -> Path | StoreUrl:
    """Write the store that the configuration describes, and return its path or URL.

    A complete store of the same import is reused, and an interrupted one resumed: it ends with the same bytes.

    Raises:
        MissingFileError: there is no such source.
        StoreError: the source is of no known format, damaged, or does not fit the options; or the store is of another
            import.
        ConfigError: an option does not fit the source.
    """
    root, target = user_path(config.source), locate(config.store)
    if not root.exists():
        raise MissingFileError(f"nothing at '{root}'; expected the folder or file of activations to import")
    if isinstance(target, Path) and target.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"the store '{target}' would be inside the source '{root}'; choose a folder outside it")
    found = find_foreign_format(root, config.format)
    source = found.open(root, Options(config.hook_points, config.layers, config.aligned))
    shape = source.shape
    if shape.context_size is not None and config.context_size not in (None, shape.context_size):
        raise ConfigError(
            f"'{root}' holds contexts of {shape.context_size}, got context_size {config.context_size}; leave it out"
        )
    contexts = Contexts(source, shape.context_size or config.context_size or DEFAULT_CONTEXT, config.holdout_fraction)
    if contexts.n_contexts == 0:
        raise StoreError(f"'{root}' holds {sum(shape.part_rows)} rows, too few for one context; lower --context_size")
    wanted = _identity(config, found, source, root, contexts)
    if _is_complete(target, wanted):
        _log.info(f"reuses store '{target}': it is complete and of this import")
        return target
    _write(config, source, contexts, wanted, _dtype(config, source))
    return target


def find_foreign_format(root: Path, name: str) -> Format:
    """Return the format of this name, or with "auto" the one that the files have.

    Raises:
        StoreError: the files are of no known format, or not of the one that was named.
    """
    known = ", ".join(sorted(found.name for found in FOREIGN_FORMATS))
    for found in FOREIGN_FORMATS:
        if name in ("auto", found.name) and found.is_in(root):
            return found
    if name == "auto":
        raise StoreError(
            f"'{root}' holds no activations of a known format; expected one of {known} (docs/importing.md)"
        )
    raise StoreError(f"'{root}' holds no files of format {name}; docs/importing.md lists the files of each format")


def _dtype(config: ImportConfig, source: Source) -> str:
    return source.shape.dtype if config.dtype == "source" else config.dtype


def _identity(config: ImportConfig, found: Format, source: Source, root: Path, contexts: Contexts) -> dict[str, Any]:
    """Return what determines the store's rows."""
    shape = source.shape
    folder = root if root.is_dir() else root.parent
    return {
        "format": found.name,
        "files": f"{len(shape.files)} files with digest {digest(shape.files, folder)}",
        "hook_points": list(shape.hook_points),
        "context_size": contexts.size,
        "holdout_fraction": config.holdout_fraction,
        "dtype": _dtype(config, source),
        "codec": config.codec,
        "mask_token_ids": config.mask_token_ids,
    } | ({} if config.layers is None else {"layers": config.layers})


def _is_complete(target: Path | StoreUrl, wanted: dict[str, Any]) -> bool:
    """Return whether the store is there and complete; raise `StoreError` if it is not of this import."""
    manifest = find_manifest(target)
    if manifest is None:
        return False
    found = manifest.header.metadata.get("import")
    if not isinstance(found, dict):
        raise StoreError(f"the store '{target}' was not written by an import; name another store")
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if keys:
        differences = ", ".join(f"{key} ({found.get(key)!r}, now {wanted.get(key)!r})" for key in keys)
        raise StoreError(f"the store '{target}' is of another import: it differs in {differences}; name another store")
    return manifest.completion is not None


def _write(config: ImportConfig, source: Source, contexts: Contexts, wanted: dict[str, Any], dtype: str) -> None:
    shape, size = source.shape, contexts.size
    metadata = dict(shape.metadata)
    named = {"model": config.model, "tokenizer": config.tokenizer}
    metadata |= {key: value for key, value in named.items() if value is not None}
    if shape.has_mask:
        from ..format.roles import ROLE_NAMES

        metadata["roles"] = list(ROLE_NAMES)
    metadata |= {
        "dataset": f"{wanted['format']}: {Path(config.source).name}",
        "context_size": size,
        "holdout_fraction": config.holdout_fraction,
        "mask_token_ids": config.mask_token_ids,
        "import": wanted,
    }
    row_bytes = sum(shape.hook_points.values()) * ITEM_BYTES[shape.dtype]
    step = max(1, BATCH_BYTES // (row_bytes * size))
    writer = ActivationStoreWriter(
        config.store,
        shape.hook_points,
        size,
        dtype=dtype,
        codec=config.codec,
        mask_token_ids=config.mask_token_ids,
        metadata=metadata,
        n_contexts=contexts.n_contexts,
        threads=config.threads,
        roles=shape.has_mask,
        cache=config.cache,
    )
    n_done = writer.n_committed_contexts
    bar = progress(total=contexts.n_contexts * size, initial=n_done * size, desc="import", unit="row", unit_scale=True)
    with Interrupt() as interrupt, writer, closing(bar):
        for first in range(n_done, contexts.n_contexts, step):
            stop = min(first + step, contexts.n_contexts)
            batch = contexts.batch(first, stop)
            writer.append(
                batch.activations,
                batch.tokens,
                held_out=batch.held_out,
                documents=batch.documents,
                positions=batch.positions,
                roles=batch.roles,
                document_info=batch.info,
                copy=False,
            )
            bar.update((stop - first) * size)
            interrupt.check()
    left_out = f"; {contexts.n_left_out:,} rows that fill no context were left out" if contexts.n_left_out else ""
    _log.info(
        f"imported {contexts.n_contexts * size:,} rows of {wanted['format']} at {len(shape.hook_points)} hook "
        f"point{'s' * (len(shape.hook_points) > 1)} into '{config.store}' as {dtype}, {contexts.n_held_out:,} of "
        f"{contexts.n_contexts:,} contexts held out{left_out}"
    )
    if not shape.documents and not shape.one_document_each:
        _log.info(
            "note: the source does not say which rows are of one document, so held-out rows may be of documents that "
            "are trained on"
        )
