"""The training steps of the peer libraries' own trainers. Imported only in the peers' environment."""

from __future__ import annotations

import sys
from typing import Any

import torch

sys.modules["torchvision"] = None  # type: ignore[assignment]  # it may be built for another torch


class SaeLens:
    """`SAETrainer._train_step` of SAELens: forward, loss, backward, clipping, Adam, scheduler and firing counts."""

    def __init__(self, architecture: str, d_in: int, options: Any, *, autocast: bool):
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        name, own = {
            "topk": ("TopK", {"k": options.k}),
            "batch_topk": ("BatchTopK", {"k": options.k}),
            "standard": ("Standard", {"l1_coefficient": options.sparsity}),
            "gated": ("Gated", {"l1_coefficient": options.sparsity}),
            "jumprelu": ("JumpReLU", {"l0_coefficient": options.sparsity}),
        }[architecture]
        config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=options.d_sae, **own)
        self.sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
        self.trainer = SAETrainer(
            SAETrainerConfig(10**9, options.batch_size, lr=options.lr, lr_end=options.lr, autocast=autocast),
            self.sae,
            iter(()),
        )

    def step(self, x: torch.Tensor) -> None:
        """Train on one batch."""
        self.trainer._train_step(self.sae, x)
        self.trainer.n_training_steps += 1

    def silence(self, bias: float) -> None:
        """Lower the encoder's bias so that about as many latents fire as in a trained SAE."""
        for name in ("b_enc", "b_gate"):
            if hasattr(self.sae, name):
                getattr(self.sae, name).data.fill_(bias)
                break

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return latents."""
        return self.sae.encode(x)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction."""
        return self.sae(x)


class Sparsify:
    """The step of sparsify's trainer for one SAE without gradient accumulation, with Adam."""

    def __init__(self, d_in: int, options: Any):
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae = SparseCoder(d_in, SparseCoderConfig(num_latents=options.d_sae, k=options.k))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=options.lr)
        self.fired = torch.zeros(options.d_sae, dtype=torch.int64)

    def step(self, x: torch.Tensor) -> None:
        """Train on one batch."""
        self.sae.set_decoder_norm_to_unit_norm()
        output = self.sae(x)
        output.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.fired += len(x)
        self.fired[output.latent_indices.flatten()] = 0

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction."""
        return self.sae(x).sae_out


class DictionaryLearning:
    """`TopKTrainer.update` of dictionary_learning."""

    def __init__(self, d_in: int, options: Any):
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer = TopKTrainer(
            steps=10**6,
            activation_dim=d_in,
            dict_size=options.d_sae,
            k=options.k,
            layer=0,
            lm_name="none",
            lr=options.lr,
            warmup_steps=0,
            device="cpu",
        )
        self.done = 0

    def step(self, x: torch.Tensor) -> None:
        """Train on one batch."""
        self.trainer.update(self.done, x)
        self.done += 1

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction."""
        return self.trainer.ae(x)


def make(library: str, architecture: str, d_in: int, options: Any) -> Any:
    """Return a library's step; `sae_lens_bf16` is SAELens with its option `autocast`."""
    if library.startswith("sae_lens"):
        return SaeLens(architecture, d_in, options, autocast=library.endswith("bf16"))
    return {"sparsify": Sparsify, "dictionary_learning": DictionaryLearning}[library](d_in, options)
