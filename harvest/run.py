"""Harvest: run a language model once over packed text and store what its hook points hold.

PyTorch and the libraries above it take seconds to import: a store that is complete is reused
without them.
"""

from __future__ import annotations

from pathlib import Path

from ..shared.core.interrupt import Interrupt
from ..shared.core.lazy import fast_imports
from ..shared.core.location import StoreUrl, locate
from .config import HarvestConfig
from .progress import Progress
from .ranks.launch import needs_ranks, quiet_network
from .reuse import check_unchanged, compare, identity
from .steps import open_writer, run_model, tell_standing, tell_stored, write_sources


def harvest(config: HarvestConfig) -> Path | StoreUrl:
    """Write the activation store that the configuration describes, and return its path or URL.

    A store that is complete is reused without loading the model; one that was interrupted, or holds fewer
    rows than are asked for, is resumed, and ends with the same bytes as one that was harvested at once.
    """
    store = locate(config.store)
    if needs_ranks(store, config.cache):
        quiet_network()
        from .ranks.multi_process import harvest_ranks

        return harvest_ranks(config)
    wanted = identity(config)
    standing = compare(store, wanted)
    tell_standing(store, standing)
    if standing.complete:
        return store
    with fast_imports():  # transformers imports a model's code as it loads the model
        from ..shared.store import ActivationStoreWriter
        from ..shared.store.local.store_folder import check_free
        from .plan import make_plan
        from .resume import resume_contexts
        from .tokens.tokens import read_contexts

        if isinstance(store, Path):
            check_free(store)
        plan = make_plan(config)
    contexts = read_contexts(config, plan.tokenizer, plan.group, plan.rules, plan.n_embeddings)
    contexts, n_kept = resume_contexts(store, config, contexts, plan.group)
    with Interrupt() as interrupt, open_writer(config, plan, wanted, ActivationStoreWriter, n_kept) as writer:
        write_sources(config, plan, writer)
        with Progress(writer, config.context_size, config.n_contexts, writer.assignment.n_done) as progress:
            run_model(config, plan, writer, contexts, progress, interrupt.check)
        check_unchanged(config, wanted)
    tell_stored(config, plan, writer.n_contexts, writer.bytes_written, writer.raw_bytes)
    return store
