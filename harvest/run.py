"""The harvest stage: run a language model once over packed text and store the activations at its hook points.

PyTorch and transformers take seconds to import, so a store that is already complete is reused without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..shared.core.compute.launcher import n_launched, silence_connection_logs
from ..shared.core.config import configured
from ..shared.core.errors import ConfigError
from ..shared.core.interrupt import Interrupt
from ..shared.core.lazy import fast_imports
from ..shared.core.location import StoreUrl, locate, staging_folder
from ..shared.store.format.layout import STAGED_FOLDER
from ..shared.synthetic.law import is_synthetic
from .config import HarvestConfig
from .progress import HarvestProgress
from .reuse import check_unchanged, compare_store, identity
from .steps import open_writer, print_status, print_stored, run_model, write_sources
from .synthetic import harvest_synthetic


def harvest(config: HarvestConfig | str | Path | None = None, **settings: Any) -> Path | StoreUrl:
    """Write the activation store that the configuration describes, and return its path or URL.

    A complete store is reused without loading the model. An interrupted store, or one with fewer rows than `tokens`,
    is resumed and ends with the same bytes as an uninterrupted one. The configuration is an object, the path of a TOML
    file, or none; keywords replace its keys.

    Raises:
        ConfigError: a key or value is not acceptable, or the store was harvested with other settings.
        ModelError, HookPointError: the model cannot be loaded, or has no such hook point.
        DataError, MissingFileError: the text cannot be read, or has too few tokens.
        NonFiniteError: an activation is NaN or infinite.
        StoreError, StoreBusyError: the path holds something else, or another process writes to it.
        DiskSpaceError, OutputError, UnreachableError: the store cannot be written.
        KeyboardInterrupt: a signal asked to stop; the same call resumes.
    """
    config = configured(HarvestConfig, config, settings)
    store = locate(config.store)
    _check_processes(config)
    if is_synthetic(config.model):
        return harvest_synthetic(config, store)
    if _needs_ranks(store, config.cache):
        silence_connection_logs()
        from .ranks.multi_process import harvest_ranks

        return harvest_ranks(config)
    wanted = identity(config)
    status = compare_store(store, wanted)
    print_status(store, status)
    if status.complete:
        return store
    with fast_imports():  # loading the model imports its code
        from ..shared.store import ActivationStoreWriter
        from ..shared.store.local.store_folder import check_free
        from .model.plan import make_plan
        from .resume import resume_contexts
        from .tokens.tokens import read_contexts

        if isinstance(store, Path):
            check_free(store)
        plan = make_plan(config)
    contexts = read_contexts(config, plan.tokenizer, plan.group, plan.rules, plan.n_embeddings)
    contexts, n_kept = resume_contexts(store, config, contexts, plan.group)
    with Interrupt() as interrupt, open_writer(config, plan, wanted, ActivationStoreWriter, n_kept) as writer:
        write_sources(config, plan, writer)
        with HarvestProgress(writer, config.context_size, config.n_contexts, writer.assignment.n_done) as progress:
            run_model(config, plan, writer, contexts, progress, interrupt.check)
        check_unchanged(config, wanted)
    print_stored(config, plan, writer.n_contexts, writer.bytes_written, writer.raw_bytes)
    return store


def _check_processes(config: HarvestConfig) -> None:
    """Raise `ConfigError` unless the engine runs in as many processes as were started."""
    n = n_launched()
    if config.engine == "vllm" and n > 1:
        raise ConfigError(
            f"{n} processes were started, but engine = 'vllm' runs in one: it starts its own for tensor_parallel GPUs; "
            "start it without a launcher"
        )
    if config.engine == "transformers" and n == 1 and config.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel = {config.tensor_parallel} needs that many processes, or a multiple: start them with "
            f"torchrun --nproc-per-node {config.tensor_parallel} -m thresher.harvest ..."
        )


def _needs_ranks(store: Path | StoreUrl, cache: str | None) -> bool:
    """Return whether several processes harvest, or earlier ranks left staged shards to adopt."""
    folder = store if isinstance(store, Path) else staging_folder(store, cache)
    return n_launched() > 1 or (folder / STAGED_FOLDER).is_dir()
