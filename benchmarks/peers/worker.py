"""Take training steps with one library on request, so that several libraries can take turns on one machine.

A number on standard input requests that many steps; the answer is a line of JSON with their seconds. At the end of the
input, the last line has the explained variance on the test rows, L0, and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def make(options: argparse.Namespace, d_in: int) -> Any:
    """Return the library's step."""
    if options.library.startswith("thresher"):
        from ours import Thresher

        dtype = torch.float32 if options.library.endswith("fp32") else torch.bfloat16
        return Thresher(options.architecture, d_in, options, dtype)
    from libraries import make as make_peer

    return make_peer(options.library, options.architecture, d_in, options)


def quieten(library: Any, x: torch.Tensor, l0: float) -> None:
    """Lower the bias of a library's SAE by bisection until about `l0` latents fire."""
    low, high = -40.0, 0.0
    for _ in range(12):
        library.silence((low + high) / 2)
        with torch.no_grad():
            fires = float((library.encode(x) > 0).sum(1).float().mean())
        low, high = (low, (low + high) / 2) if fires > l0 else ((low + high) / 2, high)
    library.silence(low)


def explained_variance(library: Any, test: torch.Tensor) -> float:
    """Return 1 - squared error / variance, over all test rows."""
    with torch.no_grad():
        error = sum(float((library.reconstruct(x) - x).square().sum()) for x in test.split(4096))
    return 1 - error / float((test - test.mean(0)).square().sum())


def main() -> None:
    """Answer requests until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("rows")
    parser.add_argument("--architecture", default="topk")
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--start-l0", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = load_file(options.rows)
    batches = data["train"].split(options.batch_size)
    library = make(options, data["train"].shape[1])
    if options.start_l0:
        quieten(library, data["test"][:512], options.start_l0)
    done = 0
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        seconds = getattr(library, "seconds", {})
        seconds.clear()
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            library.step(batches[done % len(batches)])
            done += 1
        took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(took | {"parts": dict(seconds)}), flush=True)
    # ru_maxrss would count what the starting process held before this one took its place.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024
    result = {"peak_mib": peak, "explained_variance": explained_variance(library, data["test"])}
    if options.start_l0:
        with torch.no_grad():
            result["l0"] = float((library.encode(data["test"][:512]) > 0).sum(1).float().mean())
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
