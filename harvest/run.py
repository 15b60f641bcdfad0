"""Harvest: run a language model once over packed text and store what its hook points hold.

PyTorch and the libraries above it take seconds to import: a store that is complete is reused
without them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from ..shared.config import to_toml
from ..shared.interrupt import Interrupt
from .config import HarvestConfig
from .estimate import check_disk, estimate, human_bytes, tell
from .identity import identity, is_complete
from .prefetch import Prefetch
from .progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..shared.store import ActivationStoreWriter
    from .packing import ContextBatch
    from .plan import Plan

BATCHES_AHEAD = 4


def harvest(config: HarvestConfig) -> Path:
    """Write the activation store that the configuration describes, and return its path.

    A store that is complete is reused without loading the model; one that was interrupted is
    gone on with, and ends with the same bytes as if it had not been.
    """
    store = Path(config.store)
    wanted = identity(config)
    if is_complete(store, wanted):
        print(f"reuses store '{store}': it is complete and of this configuration", file=sys.stderr)
        return store
    from .plan import make_plan

    plan = make_plan(config)
    with Interrupt() as interrupt, open_writer(config, plan, wanted) as writer:
        (store / "harvest.toml").write_text(to_toml(config), encoding="utf-8")
        run_model(config, plan, writer, interrupt)
    print(
        f"stored {writer.n_contexts * config.context_size:,} rows at {len(plan.widths)} hook points in '{store}'; "
        f"this run wrote {human_bytes(writer.bytes_written)} for {human_bytes(writer.raw_bytes)} of activations",
        file=sys.stderr,
    )
    return store


def open_writer(config: HarvestConfig, plan: Plan, identity: dict[str, object]) -> ActivationStoreWriter:
    """Begin the store, or open it where an interrupted harvest left it."""
    from ..shared.store import ActivationStoreWriter
    from .plan import metadata_of

    metadata = metadata_of(config, identity, plan)
    return ActivationStoreWriter(
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
    )


def run_model(config: HarvestConfig, plan: Plan, writer: ActivationStoreWriter, interrupt: Interrupt) -> None:
    """Append every context that the store does not have yet, a batch at a time.

    Batches are always cut at the same contexts, so that a resumed harvest computes the same bits;
    of the first one, contexts that are stored already are dropped.
    """
    from .forward import choose_workers, forward_passes
    from .tokens import batch_contexts, read_contexts

    n_done, n_wanted = writer.n_committed_contexts, config.n_contexts
    first_batch, n_drop = divmod(n_done, config.batch_size)
    contexts = read_contexts(config, plan.tokenizer, plan.group)
    workers = choose_workers(config.workers, plan.model.device)
    with (
        Prefetch(batch_contexts(contexts, config.batch_size, first_batch), BATCHES_AHEAD) as batches,
        closing(forward_passes(plan, batches, workers)) as passes,
        Progress(writer, config.context_size, n_wanted, n_done) as progress,
    ):
        for number, (batch, activations, seconds) in enumerate(passes):
            if number == 0:
                announce(config, plan, n_wanted - n_done, workers * batch.tokens.size / seconds)
            append(writer, batch, activations, n_drop)
            progress.update(len(batch.tokens) - n_drop)
            n_drop = 0
            interrupt.check()


def announce(config: HarvestConfig, plan: Plan, n_contexts: int, rows_per_second: float) -> None:
    """Tell what is to come, or raise `DiskSpaceError`."""
    n_rows = n_contexts * config.context_size
    needed = estimate(plan.widths, config.dtype, config.codec, n_rows, rows_per_second)
    tell(needed, len(plan.widths), check_disk(Path(config.store), needed))


def append(writer: ActivationStoreWriter, batch: ContextBatch, activations: Mapping[str, Tensor], n_drop: int) -> None:
    """Hand a batch but for its first `n_drop` contexts to the writer."""
    writer.append(
        {name: activation[n_drop:] for name, activation in activations.items()},
        batch.tokens[n_drop:],
        held_out=batch.held_out[n_drop:],
        documents=batch.documents[n_drop:],
        positions=batch.positions[n_drop:],
        document_info=batch.info,
    )
