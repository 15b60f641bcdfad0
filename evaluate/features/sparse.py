"""The active latents of one block of contexts, as a sorted sparse matrix with fast lookup."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64

from ...shared.sae import Sae


@dataclass(frozen=True)
class ActiveLatents:
    """The entries above zero in the rows from `first_row` on, sorted by row and then by latent."""

    first_row: int
    context_size: int
    d_sae: int
    row: Int64[np.ndarray, " entries"]
    latent: Int64[np.ndarray, " entries"]
    value: Float32[np.ndarray, " entries"]

    @cached_property
    def _keys(self) -> Int64[np.ndarray, " entries"]:
        return (self.row - self.first_row) * self.d_sae + self.latent

    def lookup(
        self, rows: Int64[np.ndarray, "*shape"], latents: Int64[np.ndarray, "*shape"]
    ) -> Float32[np.ndarray, "*shape"]:
        """Return the activation of each latent on the corresponding row of the block; zero if it is not active."""
        wanted = (rows - self.first_row) * self.d_sae + latents
        if not len(self._keys):
            return np.zeros(wanted.shape, dtype=np.float32)
        at = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self.value[at], np.float32(0))

    def context_peaks(
        self,
    ) -> tuple[Int64[np.ndarray, " peaks"], Int64[np.ndarray, " peaks"], Float32[np.ndarray, " peaks"]]:
        """Return (latent, row, activation) of each latent's strongest row in each context, sorted by latent."""
        n_contexts = int(self.row[-1] - self.first_row) // self.context_size + 1 if len(self.row) else 1
        group = self.latent * n_contexts + (self.row - self.first_row) // self.context_size
        if self.d_sae * n_contexts <= 1 << 31:
            # Positive floats sort like their bits, so one integer key sorts by group and then by activation.
            order = np.argsort((group << 32) | self.value.view(np.uint32).astype(np.int64))
        else:  # group numbers too large to share a 64-bit key with the activation
            order = np.lexsort((self.value, group))
        last = np.flatnonzero(np.diff(group[order], append=-1))
        peaks = order[last]
        return self.latent[peaks], self.row[peaks], self.value[peaks]


@torch.inference_mode()
def active_latents(
    sae: Sae,
    x: Float[torch.Tensor, "rows d_in"],
    usable: Bool[np.ndarray, " rows"],
    first_row: int,
    context_size: int,
    step: int,
) -> ActiveLatents:
    """Encode a block of whole contexts, `step` rows at a time; no latent is active on rows that are not usable."""
    rows = np.flatnonzero(usable)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        inside, latent, value = _encode(sae, x[torch.from_numpy(part)])
        parts.append((part[inside] + first_row, latent, value))
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return ActiveLatents(first_row, context_size, sae.d_sae, none, none, np.zeros(0, dtype=np.float32))
    row, latent, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ActiveLatents(first_row, context_size, sae.d_sae, row, latent, value)


def _encode(sae: Sae, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, latent, activation) of the entries above zero, sorted by row and then by latent."""
    x = x.to(sae.device, torch.float32)
    if sae.architecture != "topk":
        latents = sae.encode(x)
        flat = np.flatnonzero((latents > 0).cpu().numpy())
        row, latent = np.divmod(flat, sae.d_sae)
        return row, latent, latents.reshape(-1)[torch.from_numpy(flat).to(latents.device)].float().cpu().numpy()
    top_acts, top_indices = sae.encode_sparse(x)
    top_indices, order = top_indices.sort(dim=1)
    top_acts = top_acts.gather(1, order)
    value, latent = top_acts.float().cpu().numpy().reshape(-1), top_indices.cpu().numpy().reshape(-1)
    row = np.repeat(np.arange(len(x)), top_acts.shape[1])
    if not (value > 0).all():
        row, latent, value = row[value > 0], latent[value > 0], value[value > 0]
    return row, latent, value


def runs(keys: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " runs"], Int64[np.ndarray, " runs"]]:
    """Return where each run of equal values in sorted `keys` starts, and its length."""
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return first, np.diff(first, append=len(keys))
