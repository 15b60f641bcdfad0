"""Time a whole training step and its parts, and the peers' steps in turns with it.

    .venv/bin/python benchmarks/train_step.py [--d-in 768 --d-sae 12288 --k 32 --batch-size 4096] [--peers]
    .venv/bin/python benchmarks/train_step.py --peers --architecture jumprelu --sparsity 1e-3 --start-l0 48 --lr 1e-6

First the gradients are compared with those of the reference operations, an SAE trained in bfloat16 with one trained in
float32, and the choice of latents with float64; nothing is timed if one of these fails. With `--peers`, each library
takes its steps in a separate process from `.venv-peers`, in turns with ours, on the same rows; the best round counts.
Peak resident memory is per process, including imports and rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.kernels import kernels_for
from thresher.train.kernels.cpu import screen as cpu_screen
from thresher.train.kernels.cpu.int8 import multiplies_int8

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks/peers"))
PEERS = {
    "topk": ("sae_lens", "sae_lens_bf16", "dictionary_learning", "sparsify"),
    "other": ("sae_lens", "sae_lens_bf16"),
}
MOST_LOSS_OF_PRECISION = 0.002
MOST_CHOSEN_UNLIKE = 0.001


class Worker:
    """A library in a separate process."""

    def __init__(self, library: str, rows: Path, options: argparse.Namespace):
        python = sys.executable if library.startswith("thresher") else str(ROOT / ".venv-peers/bin/python")
        keys = ("architecture", "d_sae", "k", "sparsity", "start_l0", "batch_size", "lr")
        arguments = [part for key in keys for part in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]
        self.library, self.rounds = library, []
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(ROOT / "benchmarks/peers/worker.py"), library, str(rows), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks/peers")},
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.library} ended without an answer; run with --verbose to see why")

    def step(self, n_steps: int, *, count: bool = True) -> None:
        """Take steps, and keep their times if they count."""
        assert self._process.stdin is not None
        print(n_steps, file=self._process.stdin, flush=True)
        took = self._read()
        if count:
            self.rounds.append(took)

    def end(self) -> dict[str, Any]:
        """Return the summary that the process prints at its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        result = self._read()
        self._process.wait()
        return result


def check_gradients(options: argparse.Namespace) -> None:
    """Compare one step's gradients in float32 with the reference operations'."""
    from ours import Thresher

    sizes = argparse.Namespace(**{**vars(options), "d_sae": 512, "batch_size": 256, "lr": 1e-3})
    x = torch.randn(256, 64)
    gradients = []
    for backend in ("cpu", "reference"):
        trainer = Thresher(options.architecture, 64, sizes, torch.float32).trainer
        by_blocks = trainer.mode.W_dec_compute if backend == "cpu" else None
        step = StepInput(
            kernels_for("cpu", backend),
            trainer.mode.W_enc_compute,
            64.0,
            buffers=trainer.buffers,
            W_dec_compute=by_blocks,
        )
        gradients.append(trainer.architecture.step(trainer.parameters, Batch(x, x), step).gradients)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient[:], gradients[1][name], rtol=1e-4, atol=1e-6, msg=f"gradient of {name}")


def check_precision(options: argparse.Namespace) -> dict[str, float]:
    """Train three times on the same rows and return the explained variances; fail if bfloat16 costs too much.

    In bfloat16, latents are chosen from a product in that precision, and in the way used for large weights.
    """
    from ours import Thresher
    from worker import explained_variance

    sizes = argparse.Namespace(k=32, d_sae=1024, batch_size=1024, lr=3e-3, sparsity=0.0)
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(102_400 + 8192, 512, generator=generator)
    codes *= torch.rand(codes.shape, generator=generator) < 0.04
    rows = codes @ torch.randn(512, 128, generator=generator) + 0.3 * torch.randn(len(codes), 128, generator=generator)
    rows = (rows - rows.mean(0)) * (128**0.5 / rows.norm(dim=1).mean())
    found, least = {}, cpu_screen.LEAST_WEIGHTS
    for name, dtype, least_screened in (
        ("bfloat16", torch.bfloat16, least),
        ("screened", torch.bfloat16, 0),
        ("float32", torch.float32, least),
    ):
        cpu_screen.LEAST_WEIGHTS = least_screened
        library = Thresher("topk", 128, sizes, dtype)
        for x in rows[:102_400].split(1024):
            library.step(x)
        found[name] = explained_variance(library, rows[102_400:])
    cpu_screen.LEAST_WEIGHTS = least
    if found["float32"] - min(found.values()) > MOST_LOSS_OF_PRECISION:
        raise SystemExit(f"training in bfloat16 explains too little: {found}")
    return found


def check_choice(rows: torch.Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Return the fraction of rows whose k latents differ from float64's, by selection; fail if the screen's differ.

    The weights are random. Small weights are not screened.
    """
    W, b_dec = torch.randn(options.d_sae, options.d_in), torch.zeros(options.d_in)
    W, b_enc = W / W.norm(dim=1, keepdim=True), 0.1 * torch.randn(options.d_sae)
    exact = torch.topk(rows.double() @ W.double().T + b_enc, options.k, dim=1).indices.sort(1).values
    kernels = kernels_for("cpu")
    chosen = {"bfloat16": kernels.select_topk(rows.bfloat16(), W.bfloat16(), b_enc, options.k)}
    screened = cpu_screen.screened_topk(rows, W, b_enc, b_dec, options.k)
    if screened is not None:
        chosen["screened"] = screened
    differs = {name: (latents.sort(1).values != exact).any(1) for name, (_, latents) in chosen.items()}
    if screened is not None and float(differs["screened"].float().mean()) > MOST_CHOSEN_UNLIKE:
        raise SystemExit("the screen chooses other latents than float64 does")
    return {name: round(float(rows.float().mean()), 4) for name, rows in differs.items()}


def rows_of(options: argparse.Namespace, path: Path) -> None:
    """Write rows that are sums of sparse directions and noise."""
    n_rows = options.steps * options.batch_size
    codes = torch.randn(n_rows + 2048, 64).relu_()
    rows = codes @ torch.randn(64, options.d_in) / 8 + 0.3 * torch.randn(len(codes), options.d_in)
    rows -= rows.mean(0)
    rows *= options.d_in**0.5 / rows.norm(dim=1).mean()
    save_file({"train": rows[:n_rows].clone(), "test": rows[n_rows:].clone()}, path)


def report(worker: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """End a worker; return its results."""
    n_tokens = options.steps_each * options.batch_size
    best = min(worker.rounds, key=lambda took: took["seconds"])
    figures = {
        "library": worker.library,
        "tokens_per_second": n_tokens / best["seconds"],
        "milliseconds": 1e3 * best["seconds"] / options.steps_each,
        "cpu_milliseconds": 1e3 * min(took["cpu_seconds"] for took in worker.rounds) / options.steps_each,
        **worker.end(),
    }
    if best["parts"]:
        parts = {name: 1e3 * seconds / options.steps_each for name, seconds in best["parts"].items()}
        parts["rest"] = figures["milliseconds"] - sum(parts.values())
        figures["parts_ms"] = {name: round(value, 2) for name, value in parts.items()}
    return figures


def floor(options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of only the encoder's product, in each possible precision."""
    x, W = torch.randn(options.batch_size, options.d_in), torch.randn(options.d_sae, options.d_in)
    linear = torch.nn.functional.linear
    products = {torch.bfloat16: linear, torch.float32: linear}
    if multiplies_int8():
        products[torch.int8] = lambda a, b: torch._int_mm(a, b.T)  # pyright: ignore[reportPrivateImportUsage]
        x, W = x * 20, W * 20
    found = {}
    for dtype, product in products.items():
        a, b = x.to(dtype), W.to(dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            for rows in a.split(1024):
                product(rows, b)
            times.append(time.perf_counter() - started)
        found[f"encoder_product_{str(dtype).removeprefix('torch.')}_ms"] = 1e3 * min(times)
    return found


def main() -> None:
    """Check, measure and print one JSON object per library, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="topk")
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=1e-3, help="coefficient of an L1 or L0 penalty")
    parser.add_argument("--start-l0", type=float, default=0.0, help="lower biases until so many latents fire")
    parser.add_argument("--lr", type=float, default=1e-3, help="small where --start-l0 is to stay")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="batches of different rows")
    parser.add_argument("--steps-each", type=int, default=4, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--libraries", nargs="*", help="peers to run, of all")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    check_gradients(options)
    print(json.dumps({"explained_variance_of_ours": check_precision(options)}), flush=True)
    peers = options.libraries or PEERS.get(options.architecture, PEERS["other"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        rows_of(options, path)
        if options.architecture == "topk":
            unlike = check_choice(load_file(path)["test"], options)
            print(json.dumps({"rows_chosen_unlike_float64": unlike}), flush=True)
        workers = [Worker(name, path, options) for name in ("thresher", *(peers if options.peers else ()))]
        for worker in workers:
            worker.step(1, count=False)
        for _ in range(options.rounds):
            for worker in workers:
                worker.step(options.steps_each)
        figures = [floor(options), *(report(worker, options) for worker in workers)]
    ours = figures[1]
    for theirs in figures[2:]:
        theirs["thresher_is_faster"] = round(theirs["milliseconds"] / ours["milliseconds"], 2)
        theirs["thresher_takes_less_cpu"] = round(theirs["cpu_milliseconds"] / ours["cpu_milliseconds"], 2)
        theirs["thresher_takes_memory"] = round(ours["peak_mib"] / theirs["peak_mib"], 2)
        theirs["bound_by_the_encoder"] = round(theirs["milliseconds"] / min(figures[0].values()), 2)
    for line in figures:
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in line.items()}))
    output = ROOT / "runs/bench" / f"train_step_{options.architecture}_{options.d_in}_{options.d_sae}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"options": vars(options), "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
