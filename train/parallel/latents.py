"""One SAE sharded over its latents: each rank holds some rows of `W_enc` and `W_dec` and sees every batch whole.

This uses plain collectives on ordinary tensors, not DTensor: the selection leaves a different number of latents per row
on every rank, and no DTensor placement describes such a matrix. In each step, ranks exchange the candidates of the
selection, `[n, batch, k]`, and the partial reconstructions, `[batch, d_in]`. Gradients and Adam's moments stay local.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...shared.core.errors import ConfigError
from ..architectures.base import Architecture
from ..architectures.contract import Parameters, is_per_latent
from ..config import SaeConfig
from .collectives import RankCollectives


class LatentShards(RankCollectives):
    """Reductions for latents that are divided into one part per rank, in order."""

    shares_latents = True

    def over_latents(self, total: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        total = total.clone()
        self.ranks.add(total)
        return total

    def most_over_latents(self, numbers: Tensor) -> Tensor:
        """Return the elementwise maximum over all ranks."""
        most = numbers.clone()
        self.ranks.greatest(most)
        return most

    def only_largest(self, values: Float[Tensor, "batch k_here"], k: int) -> Float[Tensor, "batch k_here"]:
        """Keep the candidates that are among each row's k largest over all ranks, and set the others to -inf.

        Ties go to the lower rank, so that all ranks decide the same.
        """
        infinity = torch.full_like(values[:, :1], -torch.inf)
        candidates = torch.cat([values, infinity.expand(-1, k - values.shape[1])], 1)
        (every,) = self.ranks.stack(candidates)
        every = every.transpose(0, 1).reshape(len(values), -1)
        smallest = every.topk(k, dim=1).values.amin(1, keepdim=True)
        above, ties = every > smallest, every == smallest
        kept = above | (ties & (ties.cumsum(1) <= k - above.sum(1, keepdim=True)))
        here = kept[:, self.ranks.rank * k :][:, : values.shape[1]]
        return values.where(here, infinity)

    def room_for_dead(self, dead: Bool[Tensor, " latents_here"]) -> int | None:
        """Return the number of dead latents, at least one, because every rank takes part in the selection."""
        return max(1, int(torch.count_nonzero(dead)))

    def gradient_norm(self, gradients: Parameters) -> Tensor:
        """Return the global norm of all gradients, including those on other ranks."""
        squares = {name: gradient.square().sum() for name, gradient in gradients.items()}
        here = torch.stack([square for name, square in squares.items() if is_per_latent(name)]).sum()
        shared = [square for name, square in squares.items() if not is_per_latent(name)]
        return torch.stack([self.over_latents(here), *shared]).sum().sqrt()

    def whole(self, tensors: Mapping[str, Tensor], d_sae: int, to: int) -> dict[str, Tensor]:
        """Return a state's tensors of all latents in host memory on rank `to`; on other ranks, return nothing."""
        sharded = {name: tensor for name, tensor in tensors.items() if is_per_latent(name) and tensor.dim()}
        joined = self.ranks.join(sharded, d_sae, to)
        return {name: joined.get(name, tensor) for name, tensor in tensors.items()} if self.ranks.rank == to else {}


def check_can_be_sharded(sae: SaeConfig, architecture: Architecture) -> None:
    """Raise `ConfigError` for an SAE whose latents cannot be divided over ranks."""
    what = architecture.needs_all_latents
    if what is not None:
        raise ConfigError(
            f"SAE '{sae.name}': parallel = 'latents' trains plain topk and batch_topk, but not {what}; "
            "use 'spread' or 'data'"
        )
    if sae.resample_every_tokens is not None:
        raise ConfigError(
            f"SAE '{sae.name}': parallel = 'latents' cannot resample dead latents; "
            "leave resample_every_tokens out, or use 'spread' or 'data'"
        )
