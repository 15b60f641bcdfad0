"""Train another library's TopK SAE on given activations and print its explained variance and speed as JSON.

Runs in the peers' environment: `.venv-peers/bin/python benchmarks/peers/train_topk.py LIBRARY ROWS.safetensors
--lr 3e-3`. The file holds `train [n, d_in]`, in the order to train in, and `test [m, d_in]`. Each library's
own module, initialisation, loss and decoder handling are used; the schedule (Adam, warm-up, linear decay
over the last fifth) is the same for all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from safetensors.torch import load_file

sys.modules["torchvision"] = None  # type: ignore[assignment]  # it may be built for another torch


class Sparsify:
    def __init__(self, d_in: int, d_sae: int, k: int, mean: torch.Tensor):
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k))
        self.sae.b_dec.data = mean.clone()

    def step(self, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae(x).sae_out


class SaeLens:
    def __init__(self, d_in: int, d_sae: int, k: int, mean: torch.Tensor):
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
        self.sae.b_dec.data = mean.clone()

    def step(self, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        from sae_lens.saes.sae import TrainStepInput

        output = self.sae.training_forward_pass(
            TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae(x)


LIBRARIES = {"sparsify": Sparsify, "sae_lens": SaeLens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("rows")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--warmup-steps", type=int, default=50)
    options = parser.parse_args()
    data = load_file(options.rows)
    train, test = data["train"], data["test"].float()
    torch.manual_seed(0)
    peer = LIBRARIES[options.library](train.shape[1], options.d_sae, options.k, train[:65536].float().mean(0))
    optimizer = torch.optim.Adam(peer.sae.parameters(), lr=options.lr)
    n_steps = len(train) // options.batch_size
    n_decay = n_steps // 5
    started, cpu = time.perf_counter(), time.process_time()
    for step in range(n_steps):
        rising = min(1.0, (step + 1) / options.warmup_steps)
        falling = min(1.0, (n_steps - step) / n_decay)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(rising, falling)
        peer.step(train[step * options.batch_size : (step + 1) * options.batch_size].float(), optimizer)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    with torch.no_grad():
        error = sum(float((peer.reconstruct(x) - x).square().sum()) for x in test.split(8192))
    explained = 1 - error / float((test - test.mean(0)).square().sum())
    n_tokens = n_steps * options.batch_size
    print(
        json.dumps(
            {
                "library": options.library,
                "lr": options.lr,
                "explained_variance": explained,
                "tokens_per_second": n_tokens / seconds,
                "tokens_per_cpu_second": n_tokens / cpu_seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
