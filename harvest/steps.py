"""The steps of a harvest that a single process and several ranks share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..shared.core.config import to_toml
from ..shared.core.location import StoreUrl, locate
from .config import HarvestConfig
from .estimate import human_bytes, report_estimate
from .prefetch import Prefetch
from .progress import HarvestProgress
from .reuse import StoreStatus, find_manifest, resumed_metadata

if TYPE_CHECKING:
    from torch import Tensor

    from ..shared.store import ActivationStoreWriter
    from .model.plan import HarvestPlan
    from .tokens.packing import Context, ContextBatch

    Writer = TypeVar("Writer", bound=ActivationStoreWriter)

_log = logging.getLogger(__name__)

BATCHES_AHEAD = 4


def open_writer(
    config: HarvestConfig, plan: HarvestPlan, identity: dict[str, object], make: Callable[..., Writer], n_kept: int = 0
) -> Writer:
    """Create the store's writer, or reopen the store of an earlier harvest.

    `n_kept` is the number of its contexts to keep; it matters only if that harvest had another number of `tokens`.
    """
    from .model.plan import metadata_of

    metadata = metadata_of(config, identity, plan)
    return make_writer(config, plan.widths, metadata, make, roles=plan.rules.keeps_roles, keep_contexts=n_kept)


def make_writer(
    config: HarvestConfig,
    widths: Mapping[str, int],
    metadata: dict[str, Any],
    make: Callable[..., Writer],
    **more: Any,
) -> Writer:
    """Make the writer of a store with a harvest's settings, and the metadata of the store that is there, if any."""
    store = locate(config.store)
    existing = find_manifest(store)
    if existing is not None:
        metadata = resumed_metadata(store, existing.header, metadata)
    return make(
        config.store,
        widths,
        config.context_size,
        dtype=config.dtype,
        codec=config.codec,
        codec_level=config.codec_level,
        mask_token_ids=metadata.get("mask_token_ids", ()),
        metadata=metadata,
        chunk_bytes=config.chunk_bytes,
        shard_bytes=config.shard_bytes,
        n_contexts=config.n_contexts,
        threads=config.threads,
        cache=config.cache,
        **more,
    )


def write_sources(config: HarvestConfig, plan: HarvestPlan, writer: ActivationStoreWriter) -> None:
    """Write the configuration beside the store, and the tokenizer's files if they match the store's digest."""
    from ..shared.store.read.tokenizer_folder import describe_tokenizer, tokenizer_key

    writer.write_beside("harvest.toml", to_toml(config))
    files = plan.tokenizer_files
    if describe_tokenizer(files).items() <= writer.metadata.items():
        for name, content in files.items():
            writer.write_beside(tokenizer_key(name), content)


def run_model(
    config: HarvestConfig,
    plan: HarvestPlan,
    writer: ActivationStoreWriter,
    contexts: Iterator[Context],
    progress: HarvestProgress,
    check: Callable[[], object],
) -> None:
    """Run the model and append every context of the writer's assignment; call `check` after each batch.

    Batches always start at the same contexts, so that a resumed or multi-rank harvest computes the same bits. A batch
    that lies only partly in the assignment is run whole, and its other contexts are dropped.
    """
    from ..shared.model.loading.placement import input_device, is_divided, is_spread
    from ..shared.store.format.bits import TORCH_DTYPES
    from .model.forward import choose_workers, forward_passes
    from .tokens.tokens import batch_contexts

    assignment = writer.assignment
    ahead = batch_contexts(contexts, config.batch_size, assignment.n_committed // config.batch_size, assignment.parts)
    device = input_device(plan.model)
    workers = 1 if is_spread(plan.model) or is_divided(plan.model) else choose_workers(config.workers, device)
    lasting = device.type != "cuda"
    with (
        Prefetch(ahead, BATCHES_AHEAD) as batches,
        closing(forward_passes(plan, batches, workers, TORCH_DTYPES[config.dtype])) as passes,
    ):
        for number, (batch, activations, seconds) in enumerate(passes):
            if number == 0 and assignment.rank == 0:
                rows_per_second = assignment.n_ranks * workers * batch.tokens.size / seconds
                report_estimate(config, plan.widths, config.n_contexts - assignment.n_done, rows_per_second)
            for part in assignment.parts(batch.first, batch.stop):
                append(writer, batch, activations, slice(part.start - batch.first, part.stop - batch.first), lasting)
                progress.update(len(part))
            check()


def append(
    writer: ActivationStoreWriter, batch: ContextBatch, activations: Mapping[str, Tensor], part: slice, lasting: bool
) -> None:
    """Append the contexts `part` of a batch to the writer; `lasting` says that nobody overwrites the activations."""
    writer.append(
        {name: activation[part] for name, activation in activations.items()},
        batch.tokens[part],
        held_out=batch.held_out[part],
        documents=batch.documents[part],
        positions=batch.positions[part],
        roles=None if batch.roles is None else batch.roles[part],
        document_info=batch.info,
        copy=not lasting,
    )


def print_status(store: Path | StoreUrl, status: StoreStatus) -> None:
    """Print the notes on an existing store, and whether it is complete."""
    for note in status.notes:
        _log.info(f"note: {note}")
    if status.complete:
        _log.info(f"reuses store '{store}': it is complete and of this configuration")


def print_stored(config: HarvestConfig, plan: HarvestPlan, n_contexts: int, bytes_written: int, raw_bytes: int) -> None:
    """Print what the store holds and what this run wrote."""
    n_hook_points = len(plan.widths)
    _log.info(
        f"stored {n_contexts * config.context_size:,} rows at {n_hook_points} hook point{'s'[: n_hook_points != 1]} in "
        f"'{config.store}'; "
        f"this run wrote {human_bytes(bytes_written)} for {human_bytes(raw_bytes)} of activations"
    )
