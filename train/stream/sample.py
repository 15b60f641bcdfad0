"""A sample of a store's training rows: evenly spaced chunks, always the same, because trained weights depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .row_mask import TrainingRowMask

if TYPE_CHECKING:
    from ...shared.store import ActivationStore

_CHUNKS_AT_ONCE = 32


def centred_rows(store: ActivationStore, hook_point: str, n_rows: int) -> Iterator[Float[Tensor, "rows d_in"]]:
    """Yield about `n_rows` training rows minus the store's exact mean, in float32: all rows if there are no more."""
    mean = torch.as_tensor(store.moments(hook_point).mean).to(torch.float32)
    rows_per_chunk = store.training_rows_per_chunk()
    chunks = np.flatnonzero(rows_per_chunk)
    n_chosen = -(-len(chunks) * n_rows // max(int(rows_per_chunk.sum()), n_rows))
    chunks = chunks[np.arange(n_chosen) * len(chunks) // n_chosen]
    usable = TrainingRowMask(store)
    for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
        some = chunks[start : start + _CHUNKS_AT_ONCE]
        mask = torch.from_numpy(usable.of(some).reshape(-1))
        yield store.read_chunks(hook_point, some)[mask].to(torch.float32).sub_(mean)
