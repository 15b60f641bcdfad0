"""How a run normalises the rows of its hook points: chosen when it begins, and kept for when it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...shared.core.errors import ConfigError
from ..stream.normalization import Normalization, RowScale, normalization_of, row_scale, scale_of_raw_norm
from ..stream.rotation import Rotation, principal_axes
from .checkpoint import checksum_of, read_tensors, save_tensors
from .record import RunRecord

if TYPE_CHECKING:
    from ...shared.core.compute.processes import Ranks
    from ...shared.store import ActivationStore
    from ..config import TrainConfig

AXES_NAME = "principal_axes.safetensors"


def begin_normalizations(
    config: TrainConfig, places: list[str], rotated: set[str], record: RunRecord, store: ActivationStore, ranks: Ranks
) -> dict[str, Normalization]:
    """Return the normalisation of the hook points of a run, and add to its record what is not known yet.

    Those in `rotated` are rotated. All ranks call this. Principal axes are kept in a file of the run's folder, because
    another machine computes them with other bits.

    Raises:
        ConfigError: that file is damaged, and this machine computes other axes.
        StoreError, NonFiniteError: the rows of a hook point cannot be normalised.
    """
    record.row_scales = ranks.from_first(_row_scales(config, places, record, store) if ranks.first else {})
    kinds = {place: normalization_of(store, place, record.row_scales[place]) for place in places}
    if not rotated:
        return kinds
    path = Path(config.output) / AXES_NAME
    scales, known = record.row_scales, record.axes or {}
    turned = {place: kind for place, kind in kinds.items() if place in rotated}
    record.axes = ranks.from_first(_keep_axes(path, turned, scales, known, store) if ranks.first else {})
    axes = read_tensors(path)
    return kinds | {place: replace(kind, rotation=Rotation((axes[place],))) for place, kind in turned.items()}


def _row_scales(
    config: TrainConfig, places: list[str], record: RunRecord, store: ActivationStore
) -> dict[str, RowScale]:
    """Return how the run scaled each hook point's rows when it began, computed as its release did."""
    kind, max_row_norm = config.normalize_activations, config.max_row_norm
    known = record.row_scales
    if known is None:  # a release that shortened no rows
        factors = record.scales or {place: scale_of_raw_norm(store, place, kind) for place in places}
        known = {place: RowScale(factor=factor) for place, factor in factors.items()}
    return {place: known.get(place) or row_scale(store, place, kind, max_row_norm) for place in places}


def _keep_axes(
    path: Path,
    kinds: Mapping[str, Normalization],
    scales: Mapping[str, RowScale],
    known: Mapping[str, int],
    store: ActivationStore,
) -> dict[str, int]:
    """Return the checksums of the principal axes in a file, after adding those that are missing or damaged."""
    axes = {
        place: matrix
        for place, matrix in read_tensors(path).items()
        if place in kinds and checksum_of({place: matrix}) == known.get(place)
    }
    missing = [place for place in kinds if place not in axes]
    for place in missing:
        axes[place] = principal_axes(store, place, scales[place].factor, kinds[place].max_norm)
        if known.get(place, checksum := checksum_of({place: axes[place]})) != checksum:
            raise ConfigError(
                f"'{path}' is missing or damaged, and this machine computes other axes of '{place}'; resume on the "
                f"machine where the run began, or remove '{path.parent}' to train again"
            )
    if missing:
        save_tensors(path, axes)
    return {place: checksum_of({place: axes[place]}) for place in kinds}
