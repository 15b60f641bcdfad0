"""Harvest one store with several ranks, or with one process if earlier ranks left staged shards.

Every rank reads and packs the whole text and tokenizes its part of it (`divided_text`), runs the model over the batches
that overlap its shards, and writes those shards. Two ranks whose shards share a batch both run the whole batch, so that
each computes the same bits as a single process. With `tensor_parallel`, a rank is a team of processes: the first one
does all this, and the others follow its forward passes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...shared.core.errors import DataError, StoreError
from ...shared.core.interrupt import Interrupt
from ...shared.core.location import StoreUrl, locate
from ...shared.store.format.checksum import crc32c
from ...shared.store.format.layout import bytes_per_value
from ...shared.store.write.rank_store import POLL_SECONDS
from ...shared.store.write.rank_writer import RankWriter
from ..config import HarvestConfig
from ..model.forward import MAX_WORKERS, follow
from ..model.plan import HarvestPlan, make_plan
from ..resume import resume_contexts
from ..reuse import check_unchanged, compare_store, identity
from ..steps import open_writer, print_status, print_stored, run_model, write_sources
from ..tokens.packing import Context
from ..tokens.tokens import read_contexts
from .divided_text import DividedText, batches_ahead
from .rank_group import RankGroup, join_leaders, join_ranks, rank_device, wait_for
from .rank_progress import RankProgress

_log = logging.getLogger(__name__)

SECONDS_UNTIL_VISIBLE = 120
_MAX_THREADS = 8


def harvest_ranks(config: HarvestConfig) -> Path | StoreUrl:
    """Write the store together with the other ranks, and return its path or URL."""
    store = locate(config.store)
    with join_ranks(config.tensor_parallel) as (everyone, team):
        wanted = identity_of_ranks(config, everyone)
        everyone.agree(wanted | {"store": str(store)})
        status = everyone.lead(lambda: compare_store(store, wanted))
        print_status(store, status)
        if status.complete:
            return store
        own_config = rank_config(config, everyone)
        everyone.agree({"torch": torch.__version__, "processor": processor(own_config.device)})
        ranks = join_leaders(everyone, team)
        plan = make_plan(own_config, team)
        if team is not None and not team.first:
            follow(plan)
            return store
        text = TextChecksum()
        shard_rows = config.shard_bytes // (max(plan.widths.values()) * bytes_per_value(config.dtype, config.codec))
        divided = DividedText(ranks, batches_ahead(shard_rows, ranks.n)) if ranks.n > 1 else None
        contexts = text.follow(
            read_contexts(config, plan.tokenizer, plan.group, plan.rules, plan.n_embeddings, divided)
        )
        contexts, n_kept = resume_contexts(store, config, contexts, plan.group)
        ranks.agree({"contexts that the store holds": n_kept})
        writer = open_writer(own_config, plan, wanted, partial(RankWriter, group=ranks), n_kept)
        try:
            with Interrupt() as interrupt, writer, ranks.reporting_failures():
                written = harvest_assignment(config, wanted, own_config, plan, writer, ranks, interrupt, text, contexts)
        finally:
            writer.release()
        print_stored(config, plan, text.n_contexts, *written)
    return store


def identity_of_ranks(config: HarvestConfig, ranks: RankGroup) -> dict[str, Any]:
    """Return the harvest's identity. On each machine one rank hashes large files, and the others read its cache."""
    first = identity(config) if ranks.local_rank == 0 else None
    ranks.meet()
    return first or identity(config)


def rank_config(config: HarvestConfig, ranks: RankGroup) -> HarvestConfig:
    """Return the configuration with this rank's device and its share of the machine's cores."""
    cores = max(1, (os.cpu_count() or 1) // ranks.local_n)
    return msgspec.structs.replace(
        config,
        device=config.device if config.device_map else rank_device(config.device, ranks),
        threads=config.threads or min(cores, _MAX_THREADS),
        workers=config.workers or min(cores, MAX_WORKERS),
    )


def processor(device: str) -> str:
    """Return the name of the device that computes; different kinds round differently."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def harvest_assignment(
    config: HarvestConfig,
    wanted: dict[str, Any],
    own_config: HarvestConfig,
    plan: HarvestPlan,
    writer: RankWriter,
    ranks: RankGroup,
    interrupt: Interrupt,
    text: TextChecksum,
    contexts: Iterator[Context],
) -> tuple[int, int]:
    """Harvest this rank's shards and wait until the store is complete.

    Returns the bytes that all ranks wrote, and the bytes of the activations in them.
    """
    ranks.meet()
    writer.watch()
    ranks.liveness = writer.liveness
    if ranks.first:
        write_sources(config, plan, writer)
        for fault in writer.faults:
            _log.info(f"note: {fault}")

    def check() -> None:
        interrupt.check()
        ranks.check()

    with RankProgress(ranks, writer, config) as progress:
        run_model(own_config, plan, writer, contexts, progress, check)
        writer.close()
        progress.refresh(now=True)
        ranks.publish("text", text.summary)
        if ranks.first:
            complete(ranks, writer, text, progress, check, lambda: check_unchanged(config, wanted))
            ranks.publish("complete", "yes")
        else:
            wait_for(lambda: ranks.published("complete", [0]), check)
        ranks.meet()
    return progress.bytes_written, progress.raw_bytes


def complete(
    ranks: RankGroup,
    writer: RankWriter,
    text: TextChecksum,
    progress: RankProgress,
    check: Callable[[], None],
    check_text: Callable[[], None],
) -> None:
    """Adopt staged shards until all ranks are done; complete the store if its text has not changed."""

    def all_done() -> list[str] | None:
        writer.adopt()
        progress.refresh()
        return ranks.published("text")

    for rank, summary in enumerate(wait_for(all_done, check)):
        if summary != text.summary:
            raise DataError(
                f"rank {rank} read {summary} of text, rank 0 {text.summary}: the store mixes both; "
                f"give all ranks the same text, and name another store"
            )
    progress.refresh(now=True)
    visible_until = time.monotonic() + SECONDS_UNTIL_VISIBLE
    while (n_contexts := writer.adopt()) < text.n_contexts:
        check()
        if time.monotonic() > visible_until:
            raise StoreError(
                f"the ranks are done, but only {n_contexts} of {text.n_contexts} contexts are visible in "
                f"'{writer.path}'; run the same command again to resume"
            )
        time.sleep(POLL_SECONDS)
    check_text()
    writer.complete()


class TextChecksum:
    """The number of contexts read and a checksum of their tokens; all ranks must read the same."""

    def __init__(self) -> None:
        self.n_contexts = 0
        self.checksum = 0

    @property
    def summary(self) -> str:
        """The number of contexts and the checksum of their tokens."""
        return f"{self.n_contexts} contexts with checksum {self.checksum:08x}"

    def follow(self, contexts: Iterator[Context]) -> Iterator[Context]:
        """Yield the contexts, adding them to the count and the checksum."""
        for context in contexts:
            self.n_contexts += 1
            self.checksum = crc32c(context.tokens, self.checksum)
            yield context
