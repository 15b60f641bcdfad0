"""The steps of a harvest that one process and several ranks have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..shared.core.config import to_toml
from ..shared.core.location import StoreUrl, locate
from .config import HarvestConfig
from .estimate import announce, human_bytes
from .prefetch import Prefetch
from .progress import Progress
from .reuse import Standing, continued_metadata, find_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from ..shared.store import ActivationStoreWriter
    from .plan import Plan
    from .tokens.packing import Context, ContextBatch

    Writer = TypeVar("Writer", bound=ActivationStoreWriter)

BATCHES_AHEAD = 4


def open_writer(
    config: HarvestConfig, plan: Plan, identity: dict[str, object], make: Callable[..., Writer], n_kept: int = 0
) -> Writer:
    """Begin the store, or open it where an earlier harvest left it, of which `n_kept` contexts are kept.

    That number counts only for a store that was begun for another number of contexts.
    """
    from .plan import metadata_of

    metadata = metadata_of(config, identity, plan)
    store = locate(config.store)
    begun = find_manifest(store)
    if begun is not None:
        metadata = continued_metadata(store, begun.header, metadata)
    return make(
        config.store,
        plan.widths,
        config.context_size,
        dtype=config.dtype,
        codec=config.codec,
        codec_level=config.codec_level,
        mask_token_ids=metadata["mask_token_ids"],
        metadata=metadata,
        chunk_bytes=config.chunk_bytes,
        shard_bytes=config.shard_bytes,
        n_contexts=config.n_contexts,
        threads=config.threads,
        covariance=config.covariance,
        roles=plan.rules.keeps_roles,
        cache=config.cache,
        keep_contexts=n_kept,
    )


def write_sources(config: HarvestConfig, plan: Plan, writer: ActivationStoreWriter) -> None:
    """Write the configuration, and the tokenizer's files if they are those that the store names."""
    from ..shared.store.read.tokenizer_folder import describe_tokenizer, tokenizer_key

    writer.write_beside("harvest.toml", to_toml(config))
    files = plan.tokenizer_files
    if describe_tokenizer(files).items() <= writer.metadata.items():
        for name, content in files.items():
            writer.write_beside(tokenizer_key(name), content)


def run_model(
    config: HarvestConfig,
    plan: Plan,
    writer: ActivationStoreWriter,
    contexts: Iterator[Context],
    progress: Progress,
    check: Callable[[], object],
) -> None:
    """Append every context of the writer's assignment, a batch at a time; `check` may raise between batches.

    Batches are always cut at the same contexts, so that a harvest that resumes, or is shared among ranks, computes the
    same bits; of those that lie partly in the assignment, the other contexts are dropped.
    """
    from .forward import choose_workers, forward_passes
    from .tokens.tokens import batch_contexts

    assignment = writer.assignment
    ahead = batch_contexts(contexts, config.batch_size, assignment.n_committed // config.batch_size, assignment.parts)
    workers = choose_workers(config.workers, plan.model.device)
    with (
        Prefetch(ahead, BATCHES_AHEAD) as batches,
        closing(forward_passes(plan, batches, workers)) as passes,
    ):
        for number, (batch, activations, seconds) in enumerate(passes):
            if number == 0 and assignment.rank == 0:
                rows_per_second = assignment.world * workers * batch.tokens.size / seconds
                announce(config, plan.widths, config.n_contexts - assignment.n_done, rows_per_second)
            for part in assignment.parts(batch.first, batch.stop):
                append(writer, batch, activations, slice(part.start - batch.first, part.stop - batch.first))
                progress.update(len(part))
            check()


def append(writer: ActivationStoreWriter, batch: ContextBatch, activations: Mapping[str, Tensor], part: slice) -> None:
    """Hand a part of a batch's contexts to the writer."""
    writer.append(
        {name: activation[part] for name, activation in activations.items()},
        batch.tokens[part],
        held_out=batch.held_out[part],
        documents=batch.documents[part],
        positions=batch.positions[part],
        roles=None if batch.roles is None else batch.roles[part],
        document_info=batch.info,
        copy=False,
    )


def tell_standing(store: Path | StoreUrl, standing: Standing) -> None:
    """Say what to know about a store that is there, and whether there is nothing to do."""
    for note in standing.notes:
        print(f"note: {note}", file=sys.stderr)
    if standing.complete:
        print(f"reuses store '{store}': it is complete and of this configuration", file=sys.stderr)


def tell_stored(config: HarvestConfig, plan: Plan, n_contexts: int, bytes_written: int, raw_bytes: int) -> None:
    """Say what the store holds and what this run wrote."""
    n_places = len(plan.widths)
    print(
        f"stored {n_contexts * config.context_size:,} rows at {n_places} hook point{'s'[: n_places != 1]} in "
        f"'{config.store}'; "
        f"this run wrote {human_bytes(bytes_written)} for {human_bytes(raw_bytes)} of activations",
        file=sys.stderr,
    )
