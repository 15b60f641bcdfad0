"""Build the feature index of every SAE in one pass over the store."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from ...shared.core.disk import writing
from ...shared.core.errors import DataError, StoreError
from ...shared.core.paths import user_path
from ...shared.core.terminal.progress import progress as show_progress
from ...shared.model.hook_points import members
from ...shared.store import ActivationStore
from ..metrics.encoding import rows_at_a_time
from ..saes.digests import vocabulary
from ..saes.hook_group import concatenate
from ..saes.names import file_names
from .contexts import BestContexts, sampling_priority
from .files import FeatureIndex, write_index
from .fingerprint import context_fingerprint, fingerprint
from .logits import LogitEffects, effects_through, readout_of, why_no_effects
from .progress import Pace, progress_path, remove_progress, restore_progress, save_progress
from .readout import Readout
from .rows import LatentRows, VisitedRows
from .sparse import active_latents
from .statistics import ActivationStatistics, CoFiring
from .token_text import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

BLOCK_ROWS = 8192


class NamedSae(Protocol):
    """An SAE with its name and the hook points that it reads and reconstructs."""

    @property
    def name(self) -> str: ...
    @property
    def sae(self) -> Any: ...
    @property
    def hook_point(self) -> str: ...
    @property
    def target(self) -> str: ...


class FeatureSettings(NamedTuple):
    """The size of the index. Memory per latent is about `(n_top + n_sampled) * (2 * window + 20)` bytes."""

    max_rows: int = 1_000_000
    n_top: int = 10
    n_sampled: int = 10
    window: int = 32
    n_neighbours: int = 8
    n_tokens: int = 10
    max_pairs: int = 1 << 24
    seed: int = 0


class _Pass:
    """The statistics and contexts collected for one SAE, and the number of blocks that they cover."""

    def __init__(
        self, sae: NamedSae, settings: FeatureSettings, context_size: int, total_rows: int, path: Path, fingerprint: str
    ):
        d_sae, window = sae.sae.d_sae, min(settings.window, context_size)
        self.sae, self.settings = sae, settings
        self.statistics = ActivationStatistics(d_sae)
        self.top = BestContexts(d_sae, settings.n_top, window)
        self.sampled = BestContexts(d_sae, settings.n_sampled, window)
        self.co_firing = CoFiring(d_sae, total_rows, settings.max_pairs)
        self.path, self.fingerprint, self.failed = path, fingerprint, ""
        self.n_blocks = restore_progress(progress_path(path), fingerprint, self._parts)

    @property
    def _parts(self) -> dict[str, Any]:
        names = ("statistics", "top", "sampled", "co_firing")
        return {name: getattr(self, name) for name in names}

    def save(self) -> None:
        """Write the progress to disk."""
        self.co_firing.merge()
        save_progress(progress_path(self.path), self.fingerprint, self.n_blocks, self._parts)

    def add(self, x: torch.Tensor, usable: np.ndarray, first_row: int, context_size: int) -> None:
        sae = self.sae.sae
        block = active_latents(sae, x, usable, first_row, context_size, rows_at_a_time(sae))
        if not np.isfinite(block.value).all():
            self.failed = "its latents are NaN or infinite on some of the rows that the feature index reads"
            return
        n_rows = int(usable.sum())
        self.statistics.add(block, n_rows)
        self.co_firing.add(block, n_rows)
        latent, row, value = block.context_peaks()
        self.top.add(block, latent, row, value, value.astype(np.float64))
        priority = sampling_priority(latent, row // context_size, self.settings.seed)
        self.sampled.add(block, latent, row, value, priority)
        self.n_blocks += 1


def build_feature_index(
    store: ActivationStore,
    saes: Sequence[NamedSae],
    output: str | Path,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: FeatureSettings | None = None,
    on_failure: Callable[[str, str], object] | None = None,
) -> dict[str, FeatureIndex]:
    """Write `<output>/<name>.parquet` for every SAE, reading the store once; return the opened indexes by name.

    With `model`, the index contains logit effects; with `tokenizer`, the text of the tokens. An existing index of the
    same SAE, store, model and settings is reused. A pass that was killed resumes from its last saved progress, which is
    saved about once a minute. No index is written for an SAE whose latents are not finite; `on_failure` is called with
    its name and the reason.

    Raises:
        StoreError: the store contains no tokens.
        SaeError: an SAE's latents may be negative.
    """
    settings = settings or FeatureSettings()
    for sae in saes:
        sae.sae.check_never_negative("a feature index")
    if not store.has_tokens:
        raise StoreError(f"a feature index needs tokens, and store '{store.path}' contains none; write it with tokens")
    files = file_names(sae.name for sae in saes)
    paths = {sae.name: user_path(output) / f"{files[sae.name]}.parquet" for sae in saes}
    readout = readout_of(model) if model is not None else None
    context = context_fingerprint(store, readout, tokenizer)
    prints = {
        sae.name: fingerprint(context, sae.sae, [sae.name, sae.hook_point, sae.target, settings, BLOCK_ROWS])
        for sae in saes
    }
    indexes = {name: index for name, path in paths.items() if (index := _existing(path, prints[name]))}
    missing = [sae for sae in saes if sae.name not in indexes]
    if missing:
        passes, visited = read_blocks(store, missing, settings, paths, prints)
        for one in show_progress(passes, unit="SAE", desc="write features"):
            sae = one.sae
            if one.failed:
                if on_failure is not None:
                    on_failure(sae.name, one.failed)
                with writing(paths[sae.name]):
                    paths[sae.name].unlink(missing_ok=True)
                continue
            effects, note = _effects(readout, sae, settings, tokenizer)
            metadata = {
                "name": sae.name,
                "hook_point": sae.hook_point,
                "architecture": sae.sae.architecture,
                "n_rows": one.statistics.n_rows,
                "n_contexts": visited.n_contexts,
                "context_size": store.context_size,
                "logit_effects": note,
                "fingerprint": prints[sae.name],
                **settings._asdict(),
            }
            indexes[sae.name] = _write(paths[sae.name], one, visited, effects, tokenizer, metadata)
    for path in paths.values():
        remove_progress(path)
    if readout is not None:
        _print_unusual_logit_effects(readout, list(indexes.values()))
    return {sae.name: indexes[sae.name] for sae in saes if sae.name in indexes}


def _effects(
    readout: Readout | str | None,
    sae: NamedSae,
    settings: FeatureSettings,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[LogitEffects | None, str]:
    """Return an SAE's logit effects, and a description of the path to the logits or of why there are none."""
    if readout is None:
        return None, "none: no model"
    reason = why_no_effects(readout, sae.sae.d_out, sae.target)
    if isinstance(readout, str) or reason is not None:
        return None, f"none: {reason}"
    tokens = vocabulary(tokenizer)
    ids = None if tokens is None else tokens.values()
    effects = effects_through(readout, sae.sae.W_dec, settings.n_tokens, vocabulary=ids)
    return effects, f"through {readout.describe()}"


def _print_unusual_logit_effects(readout: Readout | str, indexes: Sequence[FeatureIndex]) -> None:
    """Print each distinct note if there are no logit effects, or if they pass through no norm."""
    if isinstance(readout, Readout) and readout.has_norm:
        return
    for note in dict.fromkeys(str(index.metadata.get("logit_effects")) for index in indexes):
        _log.info(f"logit effects  {note}")


def read_blocks(
    store: ActivationStore,
    saes: Sequence[NamedSae],
    settings: FeatureSettings,
    paths: dict[str, Path],
    prints: dict[str, str],
) -> tuple[list[_Pass], VisitedRows]:
    """Read blocks of whole contexts, evenly spaced if the store has more than `max_rows` rows."""
    size = store.context_size
    per_block = max(1, BLOCK_ROWS // size)
    n_blocks = -(-store.n_contexts // per_block)
    wanted = min(n_blocks, max(1, settings.max_rows // (per_block * size)))
    blocks = np.arange(wanted) * n_blocks // wanted
    visited = VisitedRows(size)
    total = wanted * per_block * size
    passes = [_Pass(sae, settings, size, total, paths[sae.name], prints[sae.name]) for sae in saes]
    pace, n_threads = Pace(), min(len(passes), os.cpu_count() or 1)
    # Without the initializer, a new thread's first matrix product would use all cores and round differently.
    n_torch_threads = max(1, torch.get_num_threads() // n_threads)
    with (
        show_progress(total=total, unit="token", unit_scale=True, desc="features") as progress,
        _torch_threads(n_torch_threads),
        ThreadPoolExecutor(n_threads, "features", torch.set_num_threads, (n_torch_threads,)) as threads,
    ):
        for number, block in enumerate(blocks.tolist()):
            start, stop = block * per_block * size, min((block + 1) * per_block, store.n_contexts) * size
            usable = np.asarray(store.row_mask(start, stop))
            visited.add(store, start, stop)
            waiting = [one for one in passes if one.n_blocks <= number and not one.failed]
            hook_points = dict.fromkeys(one.sae.hook_point for one in waiting)
            parts = {name: store.read(name, start, stop) for group in hook_points for name in members(group)}
            activations = {hook_point: concatenate(parts, hook_point) for hook_point in hook_points}
            work = [threads.submit(one.add, activations[one.sae.hook_point], usable, start, size) for one in waiting]
            for one in work:
                one.result()
            progress.update(stop - start)
            if pace.due():
                started = time.monotonic()
                for one in waiting:
                    if not one.failed:
                        one.save()
                pace.saved(started)
    return passes, visited


@contextmanager
def _torch_threads(n: int) -> Iterator[None]:
    """Limit PyTorch to `n` threads, so that the pool's threads share the cores instead of each using all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(
    path: Path,
    one: _Pass,
    visited: VisitedRows,
    effects: LogitEffects | None,
    tokenizer: PreTrainedTokenizerBase | None,
    metadata: dict[str, Any],
) -> FeatureIndex:
    neighbours = one.co_firing.neighbours(one.settings.n_neighbours)
    latents = LatentRows(one.statistics, one.top, one.sampled, visited, effects, neighbours)
    texts = TokenTexts({}, {}) if tokenizer is None else TokenTexts.of(tokenizer, latents.token_ids())
    documents = visited.document_names(latents.document_ids())
    return write_index(path, one.sae.sae.d_sae, latents.columns, metadata, texts, documents)


def _existing(path: Path, fingerprint: str) -> FeatureIndex | None:
    """Return the existing index if it has this fingerprint and is undamaged."""
    if not path.is_file():
        return None
    try:
        index = FeatureIndex.open(path)
    except DataError:
        _log.warning(f"'{path}' is damaged and is built again")
        return None
    if index.metadata.get("fingerprint") != fingerprint:
        return None
    if not index.is_intact():
        _log.warning(f"'{path}' is damaged and is built again")
        return None
    return index
