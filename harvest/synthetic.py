"""Harvest rows of a synthetic law instead of a model's activations."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..shared.core.compute.launcher import n_launched
from ..shared.core.config import to_toml
from ..shared.core.errors import ConfigError
from ..shared.core.interrupt import Interrupt
from ..shared.core.location import StoreUrl
from ..shared.store.format.layout import bytes_per_value, choose_chunk_rows
from ..shared.synthetic.law import HOOK_POINT, SyntheticLaw, find_law
from .config import HarvestConfig
from .estimate import human_bytes
from .progress import HarvestProgress
from .reuse import compare_store, find_manifest
from .steps import make_writer, print_status
from .tokens.holdout import is_held_out

if TYPE_CHECKING:
    from torch import Tensor

    from ..shared.store import ActivationStoreWriter
    from ..shared.synthetic.sampler import Sampler

_log = logging.getLogger(__name__)

SAMPLER_VERSION = 1
"""Increased whenever the same settings give other rows."""
BATCH_ROWS = 4096
_USED = (
    *("model", "hook_points", "store", "tokens", "context_size", "holdout_fraction", "seed", "dtype", "codec"),
    *("codec_level", "chunk_bytes", "shard_bytes", "cache", "threads", "workers", "device"),
)
_RECORDED = tuple(key for key in _USED if key not in ("store", "cache", "threads", "workers", "device"))


def harvest_synthetic(config: HarvestConfig, store: Path | StoreUrl) -> Path | StoreUrl:
    """Write a store of rows drawn from a named law, with the features behind them in `truth.safetensors` beside it.

    The rows of a batch of contexts depend on its number and `seed` alone, so that an interrupted or extended store ends
    with the rows of an uninterrupted one. Rows are independent of each other; whole chunks of them are held out.

    Raises:
        ConfigError: no such law, a hook point other than `features`, or a setting that only models of text have.
        StoreError: the store exists and is of another harvest.
    """
    law = find_law(config.model)
    _check_settings(config)
    wanted = _identity(config, law)
    status = compare_store(store, wanted)
    print_status(store, status)
    if status.complete:
        return store
    from ..shared.core.compute.device import choose_device, make_current
    from ..shared.synthetic.sampler import Sampler
    from ..shared.synthetic.truth import TRUTH_FILE, make_truth, truth_digest

    device = choose_device(config.device)
    make_current(device)
    truth = make_truth(law)
    content = truth.to_bytes()
    sampler = Sampler(truth.to(device))
    with Interrupt() as interrupt, _open_writer(config, store, wanted, law, truth_digest(content)) as writer:
        writer.write_beside("harvest.toml", to_toml(config))
        writer.write_beside(TRUTH_FILE, content)
        with HarvestProgress(writer, config.context_size, config.n_contexts, writer.n_committed_contexts) as progress:
            for rows, held_out in _batches(config, sampler, law, writer.n_committed_contexts):
                writer.append({HOOK_POINT: rows}, held_out=held_out, copy=False)
                progress.update(len(rows))
                interrupt.check()
    _log.info(
        f"stored {writer.n_contexts * config.context_size:,} rows of '{config.model}' in '{config.store}'; "
        f"this run wrote {human_bytes(writer.bytes_written)} for {human_bytes(writer.raw_bytes)} of activations"
    )
    return store


def _check_settings(config: HarvestConfig) -> None:
    """Raise `ConfigError` for a setting that a synthetic harvest does not use, or several processes."""
    if config.hook_points != [HOOK_POINT]:
        raise ConfigError(
            f"hook_points is {config.hook_points}, expected ['{HOOK_POINT}'], the one that '{config.model}' has"
        )
    unused = [
        field.name
        for field in msgspec.structs.fields(HarvestConfig)
        if field.name not in _USED and getattr(config, field.name) != field.default
    ]
    if unused:
        raise ConfigError(f"{', '.join(unused)}: expected none of these for '{config.model}', which reads no text")
    if n_launched() > 1:
        raise ConfigError(f"'{config.model}' is drawn in one process, got {n_launched()}; start it without a launcher")


def _identity(config: HarvestConfig, law: SyntheticLaw) -> dict[str, Any]:
    """Return what determines the rows, as a harvest of a model records it."""
    settings = msgspec.to_builtins(config)
    keys = {key: settings[key] for key in _RECORDED if settings[key] is not None}
    digest = hashlib.blake2b(msgspec.json.encode([SAMPLER_VERSION, law]), digest_size=16).hexdigest()
    content = {"weights": f"law {digest}"}
    return keys | {"batch_size": config.batch_size, "content": content}


def _open_writer(
    config: HarvestConfig, store: Path | StoreUrl, wanted: dict[str, Any], law: SyntheticLaw, digest: str
) -> ActivationStoreWriter:
    from ..shared.store import ActivationStoreWriter

    metadata: dict[str, Any] = {
        "model": config.model,
        "dataset": config.model,
        "context_size": config.context_size,
        "holdout_fraction": config.holdout_fraction,
        "seed": config.seed,
        "law": msgspec.to_builtins(law),
        "truth_digest": digest,
        "certificate": {"hook_points": {}},
        "harvest": wanted,
    }
    existing = find_manifest(store)
    keep = None if existing is None else existing.n_contexts
    return make_writer(config, {HOOK_POINT: law.d_in}, metadata, ActivationStoreWriter, keep_contexts=keep)


def _batches(
    config: HarvestConfig, sampler: Sampler, law: SyntheticLaw, n_done: int
) -> Iterator[tuple[Tensor, list[bool]]]:
    """Yield `[contexts, context_size, d_in]` rows and which contexts are held out, from context `n_done` on."""
    per_batch = max(1, BATCH_ROWS // config.context_size)
    row_bytes = law.d_in * bytes_per_value(config.dtype, config.codec)
    group = max(1, choose_chunk_rows(row_bytes, config.context_size, config.chunk_bytes) // config.context_size)

    def draw(number: int) -> tuple[Tensor, list[bool]]:
        first = number * per_batch
        rows = sampler.rows(per_batch * config.context_size, _seed(config.seed, "rows", number)).cpu()
        part = range(max(first, n_done), min(first + per_batch, config.n_contexts))
        held_out = [
            is_held_out(_seed(config.seed, "split", context // group), config.holdout_fraction) for context in part
        ]
        return rows.view(per_batch, config.context_size, -1)[part.start - first : part.stop - first], held_out

    on_gpu = sampler.truth.vectors.is_cuda
    n_workers = 1 if on_gpu else config.workers or os.cpu_count() or 1
    numbers = iter(range(n_done // per_batch, -(-config.n_contexts // per_batch)))
    with ThreadPoolExecutor(n_workers) as pool:
        ahead: deque[Future[tuple[Tensor, list[bool]]]] = deque()
        for number in numbers:
            ahead.append(pool.submit(draw, number))
            if len(ahead) > n_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _seed(*parts: object) -> int:
    """Return a 64-bit number that a hash makes of the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")
