"""The SAEs of a run, loaded when they are first needed, and the same latent in others of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.errors import MissingFileError
from ....shared.model.hook_points import canonical_hook_point
from ....shared.sae import CrossLayerTranscoder, Sae
from .checkpoints import SaeCheckpoint

KEPT_BYTES = 8 << 30


class SaeShelf:
    """SAEs by name, of which the most recently used stay in memory, and their `checkpoints`, `SAE@STEP`."""

    def __init__(
        self,
        paths: Mapping[str, Path],
        checkpoints: Iterable[SaeCheckpoint] = (),
        device: str = "cpu",
        kept_bytes: int = KEPT_BYTES,
    ):
        self.paths, self.device, self._kept_bytes = dict(paths), device, kept_bytes
        self.checkpoints = {one.name: one for one in checkpoints if one.name not in self.paths}
        self._lock = threading.Lock()
        self._saes: OrderedDict[str, Sae] = OrderedDict()
        self._norms: dict[str, Float[Tensor, " d_sae"]] = {}

    def get(self, name: str) -> Sae:
        """Return an SAE.

        Raises:
            MissingFileError: it is no longer where it was evaluated.
            SaeError: it cannot be read.
        """
        with self._lock:
            if name not in self._saes:
                self._saes[name] = self._load(name).to(self.device).eval().requires_grad_(False)
                self._drop_oldest()
            self._saes.move_to_end(name)
            return self._saes[name]

    def _load(self, name: str) -> Sae:
        if name in self.checkpoints:
            return Sae.load(self.checkpoints[name].folder)
        if name not in self.paths:
            raise MissingFileError(f"the weights of the SAE '{name}' are no longer where they were evaluated")
        return Sae.load(self.paths[name])

    def _drop_oldest(self) -> None:
        while len(self._saes) > 1 and sum(map(_bytes_of, self._saes.values())) > self._kept_bytes:
            name, _ = self._saes.popitem(last=False)
            self._norms.pop(name, None)

    @torch.inference_mode()
    def matches(self, name: str, latent: int, n: int = 3) -> list[dict[str, Any]]:
        """Return, for each other SAE that writes to the same hook points, its `n` latents of largest decoder cosine."""
        own = self.get(name)
        if isinstance(own, CrossLayerTranscoder):
            return []
        direction = torch.nn.functional.normalize(own.W_dec[latent].float(), dim=0)
        found = []
        for other in self.paths:
            sae = own if other == name else self.get(other)
            if other == name or isinstance(sae, CrossLayerTranscoder) or _writes(sae) != _writes(own):
                continue
            cosine = (sae.W_dec.float() @ direction) / self._norm(other, sae)
            values, latents = cosine.topk(min(n, len(cosine)))
            rows = zip(latents.tolist(), values.tolist(), strict=True)
            found.append({"sae": other, "latents": [{"latent": row, "cosine": round(value, 4)} for row, value in rows]})
        return found

    def _norm(self, name: str, sae: Sae) -> Float[Tensor, " d_sae"]:
        if name not in self._norms:
            self._norms[name] = sae.W_dec.float().norm(dim=1).clamp_min(1e-12)
        return self._norms[name]


def _writes(sae: Sae) -> tuple[int, list[str]]:
    return sae.d_out, [canonical_hook_point(name) for name in sae.writes]


def _bytes_of(sae: Sae) -> int:
    return sum(parameter.nbytes for parameter in sae.parameters())
