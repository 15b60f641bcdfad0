"""Harvest one store by several ranks, or alone where ranks left finished shards behind a gap.

Every rank reads and packs the whole text, runs the model over the batches that its shards touch, and writes those
shards. A batch on the edge of two ranks' shards is run whole by both, so that each computes the bits that one process
would.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from ...shared.core.errors import DataError, StoreError
from ...shared.core.interrupt import Interrupt
from ...shared.core.location import StoreUrl, locate
from ...shared.store.format.checksum import crc32c
from ...shared.store.write.rank_writer import POLL_SECONDS, RankWriter
from ..config import HarvestConfig
from ..forward import MAX_WORKERS
from ..plan import Plan, make_plan
from ..resume import resume_contexts
from ..reuse import check_unchanged, compare, identity
from ..steps import open_writer, run_model, tell_standing, tell_stored, write_sources
from ..tokens.packing import Context
from ..tokens.tokens import read_contexts
from .rank_progress import RankProgress
from .ranks import Ranks, join_ranks, rank_device

T = TypeVar("T")
SECONDS_TO_SEE = 120
MAX_THREADS = 8


def harvest_ranks(config: HarvestConfig) -> Path | StoreUrl:
    """Write the store as one of the ranks that the launcher started, and return its path or URL."""
    store = locate(config.store)
    with join_ranks() as ranks:
        wanted = identity_of_ranks(config, ranks)
        ranks.agree(wanted | {"store": str(store)})
        standing = ranks.lead(lambda: compare(store, wanted))
        tell_standing(store, standing)
        if standing.complete:
            return store
        here = on_this_rank(config, ranks)
        ranks.agree({"torch": torch.__version__, "processor": processor(here.device)})
        plan = make_plan(here)
        text = Text()
        contexts = text.follow(read_contexts(config, plan.tokenizer, plan.group, plan.rules, plan.n_embeddings))
        contexts, n_kept = resume_contexts(store, config, contexts, plan.group)
        ranks.agree({"contexts that the store holds": n_kept})
        writer = open_writer(here, plan, wanted, partial(RankWriter, group=ranks), n_kept)
        try:
            with Interrupt() as interrupt, writer, ranks.tells_failures():
                written = harvest_share(config, wanted, here, plan, writer, ranks, interrupt, text, contexts)
        finally:
            writer.release()
        tell_stored(config, plan, text.n_contexts, *written)
    return store


def identity_of_ranks(config: HarvestConfig, ranks: Ranks) -> dict[str, Any]:
    """Return the harvest's identity; on each machine one rank reads large files, and the others what it kept."""
    first = identity(config) if ranks.local_rank == 0 else None
    ranks.meet()
    return first or identity(config)


def on_this_rank(config: HarvestConfig, ranks: Ranks) -> HarvestConfig:
    """Return the configuration with this rank's device and its part of the machine's cores."""
    cores = max(1, (os.cpu_count() or 1) // ranks.local_world)
    return msgspec.structs.replace(
        config,
        device=rank_device(config.device, ranks),
        threads=config.threads or min(cores, MAX_THREADS),
        workers=config.workers or min(cores, MAX_WORKERS),
    )


def processor(device: str) -> str:
    """Return what computes: two kinds round differently."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def harvest_share(
    config: HarvestConfig,
    wanted: dict[str, Any],
    here: HarvestConfig,
    plan: Plan,
    writer: RankWriter,
    ranks: Ranks,
    interrupt: Interrupt,
    text: Text,
    contexts: Iterator[Context],
) -> tuple[int, int]:
    """Harvest this rank's shards of the text, and see the store completed; return all ranks' bytes."""
    ranks.meet()
    writer.watch()
    ranks.liveness = writer.liveness
    if ranks.rank == 0:
        write_sources(config, plan, writer)
        for fault in writer.faults:
            print(f"note: {fault}", file=sys.stderr)

    def check() -> None:
        interrupt.check()
        ranks.check()

    with RankProgress(ranks, writer, config) as progress:
        run_model(here, plan, writer, contexts, progress, check)
        writer.close()
        progress.refresh(now=True)
        ranks.say("read", text.word)
        if ranks.rank == 0:
            complete(ranks, writer, text, progress, check, lambda: check_unchanged(config, wanted))
            ranks.say("complete", "yes")
        else:
            wait_for(lambda: ranks.heard("complete", [0]), check)
        ranks.meet()
    return progress.bytes_written, progress.raw_bytes


def complete(
    ranks: Ranks,
    writer: RankWriter,
    text: Text,
    progress: RankProgress,
    check: Callable[[], None],
    check_text: Callable[[], None],
) -> None:
    """Adopt what the ranks stage until all of them are done, and complete the store if its text is still the same."""

    def all_done() -> list[str] | None:
        writer.adopt()
        progress.refresh()
        return ranks.heard("read")

    words = wait_for(all_done, check)
    for rank, word in enumerate(words):
        if word != text.word:
            raise DataError(
                f"rank {rank} read {word} of text, rank 0 {text.word}: the store mixes both; "
                f"give all ranks the same text, and name another store"
            )
    progress.refresh(now=True)
    seen_until = time.monotonic() + SECONDS_TO_SEE
    while (n_contexts := writer.adopt()) < text.n_contexts:
        check()
        if time.monotonic() > seen_until:
            raise StoreError(
                f"the ranks are done, but only {n_contexts} of {text.n_contexts} contexts are to be seen in "
                f"'{writer.path}'; start the same command again to resume"
            )
        time.sleep(POLL_SECONDS)
    check_text()
    writer.complete()


def wait_for(ready: Callable[[], T | None], check: Callable[[], None]) -> T:
    """Return what `ready` returns once it is not None."""
    while (found := ready()) is None:
        check()
        time.sleep(POLL_SECONDS)
    return found


class Text:
    """What was read: all ranks must read the same."""

    def __init__(self) -> None:
        self.n_contexts = 0
        self.checksum = 0

    @property
    def word(self) -> str:
        """The number of contexts and the checksum of their tokens."""
        return f"{self.n_contexts} contexts with checksum {self.checksum:08x}"

    def follow(self, contexts: Iterator[Context]) -> Iterator[Context]:
        """Yield the contexts, taking note of them."""
        for context in contexts:
            self.n_contexts += 1
            self.checksum = crc32c(context.tokens, self.checksum)
            yield context
