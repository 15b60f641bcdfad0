"""The embeddings of one SAE's latents on disk, and the nearest of them to a query: all are compared."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....shared.core.disk import replacing


class LatentVectors(NamedTuple):
    """Unit vectors of some latents."""

    latents: Int64[Tensor, " n"]
    vectors: Float[Tensor, "n size"]

    @torch.inference_mode()
    def nearest(self, query: Float[Tensor, " size"], n: int) -> list[tuple[int, float]]:
        """Return the latents of largest cosine with a unit vector, and the cosines."""
        cosine = (self.vectors @ query.to(self.vectors.dtype)).float()
        values, places = cosine.topk(min(n, len(cosine)))
        return list(zip(self.latents[places].tolist(), values.tolist(), strict=True))


def write_vectors(path: Path, found: LatentVectors, key: str) -> None:
    """Write the vectors atomically, in float16; `key` says what they were made from."""
    tensors = {"latents": found.latents.contiguous(), "vectors": found.vectors.half().contiguous()}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"key": key})


def read_vectors(path: Path, key: str) -> LatentVectors | None:
    """Return the vectors if they were made from `key`, mapped from the file; None if not."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return LatentVectors(file.get_tensor("latents"), file.get_tensor("vectors"))
    except (SafetensorError, OSError):
        return None
