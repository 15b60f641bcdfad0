"""Time one library's whole TopK step on this GPU and print `{"ms": ..., "peak_bytes": ...}`.

Runs in the peers' environment: `python benchmarks/gpu_peers.py LIBRARY D_IN D_SAE K BATCH`. Each does what its
own trainer does in a step, with the inputs on the GPU, under bfloat16 autocast: SAELens, dictionary_learning, sparsify
with its own kernels, and `dense`, plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch

sys.modules["torchvision"] = None  # type: ignore[assignment]  # it may be built for another torch


def dense(d_in: int, d_sae: int, k: int, device: str) -> Callable[[torch.Tensor], None]:
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, device=device), dim=1)
    W_enc = torch.nn.Parameter(W_dec.clone())
    W_dec, b_dec = torch.nn.Parameter(W_dec), torch.nn.Parameter(torch.zeros(d_in, device=device))
    b_enc = torch.nn.Parameter(torch.zeros(d_sae, device=device))
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=1e-4, fused=True)

    def step(x: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16):
            top = torch.nn.functional.linear(x - b_dec, W_enc, b_enc).topk(k)
            latents = torch.zeros(len(x), d_sae, device=device, dtype=top.values.dtype)
            x_hat = latents.scatter(1, top.indices, top.values.relu()) @ W_dec + b_dec
        (x_hat.float() - x).square().sum(1).mean().backward()
        with torch.no_grad():
            gradient = W_dec.grad
            assert gradient is not None
            gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def sparsify(d_in: int, d_sae: int, k: int, device: str) -> Callable[[torch.Tensor], None]:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k)).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(x: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(device, torch.bfloat16):
            loss = sae(x).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(d_in: int, d_sae: int, k: int, device: str) -> Callable[[torch.Tensor], None]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=1_000_000,
        activation_dim=d_in,
        dict_size=d_sae,
        k=k,
        layer=0,
        lm_name="none",
        warmup_steps=0,
        device=device,
    )
    step_number = 0

    def step(x: torch.Tensor) -> None:
        nonlocal step_number
        step_number += 1
        with torch.autocast(device, torch.bfloat16):
            trainer.update(step_number, x)

    return step


def sae_lens(d_in: int, d_sae: int, k: int, device: str) -> Callable[[torch.Tensor], None]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=device)).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step(x: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16):
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
                )
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


LIBRARIES = {"dense": dense, "sparsify": sparsify, "dictionary_learning": dictionary_learning, "sae_lens": sae_lens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    for name in ("d_in", "d_sae", "k", "batch"):
        parser.add_argument(name, type=int)
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU and print no times")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    torch.manual_seed(0)
    step = LIBRARIES[options.library](options.d_in, options.d_sae, options.k, device)
    x = torch.randn(options.batch, options.d_in, device=device)
    for _ in range(3):
        step(x)
    if options.rehearse:
        print(json.dumps({"rehearsed": options.library}))
        return
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(20):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(x)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    print(json.dumps({"ms": sorted(times)[len(times) // 2], "peak_bytes": torch.cuda.max_memory_allocated()}))


if __name__ == "__main__":
    main()
