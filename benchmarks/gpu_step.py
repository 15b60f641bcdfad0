"""Time the kernels and whole steps on a GPU, each against its floor, PyTorch and the peers, with nobody watching.

`make bench-gpu` runs it and writes `runs/bench/gpu_step.json` and `gpu_step.md`, whose tables can go into
docs/benchmarks.md as they are. Every section of every size runs in a process of its own, so that one that fails, or
runs out of memory, costs its own rows only. What is timed is held against its reference first; a wrong result is an
error, not a time. `--peers PYTHON` names an interpreter that has the peer libraries (`make bench-gpu-peers` makes one).
`--rehearse` runs every line but the timers at tiny sizes, in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import gpu_tables
from interpreter import fit_interpreter

PEERS = ("dense", "sparsify", "dictionary_learning", "sae_lens")
SECTION_SECONDS = 540
# An H200's, on which the design's floors rest; override for another GPU.
FLOPS, BYTES_PER_SECOND = 790e12, 4.3e12


class Size(NamedTuple):
    """A step's size and its floor on an H200 in milliseconds, from the design."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    floor_ms: float | None


SIZES = [Size(768, 24_576, 32, 4096, 0.60), Size(768, 24_576, 32, 32_768, 3.0), Size(4096, 131_072, 64, 4096, 14.0)]
REHEARSAL = [Size(16, 24, 2, 4, 1.0)]
REHEARSED = ("batch_topk", "jumprelu")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu_step.json"))
    parser.add_argument("--peers", help="Python interpreter of an environment with the peer libraries")
    parser.add_argument("--flops", type=float, default=FLOPS, help="bfloat16 operations a second of this GPU")
    parser.add_argument("--bandwidth", type=float, default=BYTES_PER_SECOND, help="bytes a second of its memory")
    parser.add_argument("--store-tokens", type=int, default=1 << 21, help="rows of the stores that are streamed")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="which to run")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, no times; runs without a GPU")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call on the GPU, its launches included; without a GPU run it and return NaN."""
    import torch

    if not torch.cuda.is_available():
        run()
        return float("nan")
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def replayed(run: Callable[[], object], calls: int = 1) -> float:
    """Return the median time of a call on the GPU as part of a graph of some calls, so without its launches."""
    import torch

    if not torch.cuda.is_available():
        return milliseconds(run)
    for _ in range(3):  # kernels are compiled before the capture
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return milliseconds(graph.replay) / calls


def profiled(run: Callable[[], object], calls: int = 5) -> dict[str, Any]:
    """Return how many kernels a call launches, and microseconds and launches of those that take longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(calls if cuda else 1):
            run()
        if cuda:
            torch.cuda.synchronize()
    # Without a GPU, the operators stand for kernels.
    events = [event for event in found.key_averages() if (event.device_type.name != "CPU") is cuda]
    rows = [
        {
            "kernel": event.key[:60],
            "us": (event.self_device_time_total if cuda else event.self_cpu_time_total) / calls,
            "launches": event.count / calls,
        }
        for event in events
    ]
    rows.sort(key=lambda row: -row["us"])
    return {
        "launches": sum(row["launches"] for row in rows),
        "us": sum(row["us"] for row in rows),
        "longest": rows[:12],
    }


def make_problem(size: Size, device: Any) -> tuple[dict[str, Any], Any]:
    """Return initial parameters and a batch of which each row has about k strong directions.

    They are as skewed as in trained SAEs: a twentieth of the latents has two thirds of the entries, one most rows.
    """
    import torch

    generator = torch.Generator(device=device).manual_seed(0)
    W_dec = torch.randn(size.d_sae, size.d_in, generator=generator, device=device)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    frequency = (torch.arange(size.d_sae, device=device) + 3.0) ** -1.1
    drawn = torch.multinomial(frequency, size.batch * size.k, replacement=True, generator=generator)
    directions = drawn.view(size.batch, size.k)
    noise = torch.randn(size.batch, size.d_in, generator=generator, device=device)
    x = torch.nn.functional.embedding_bag(directions, W_dec, mode="sum") * 8 + noise
    zeros = torch.zeros(size.d_sae, device=device), torch.zeros(size.d_in, device=device)
    parameters = {"W_enc": W_dec.clone(), "b_enc": zeros[0], "W_dec": W_dec, "b_dec": zeros[1]}
    return parameters, x.to(torch.bfloat16)


def kernels(size: Size, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Check each kernel against its reference on some rows, then time it; floors from operations and bytes."""
    import torch

    from thresher.train.kernels import reference
    from thresher.train.kernels import triton as fused

    parameters, x = make_problem(size, device)
    W = parameters["W_dec"].to(torch.bfloat16)
    bias, (d, F, k, B) = parameters["b_enc"], size[:4]
    acts, indices, failed = fused.select_topk_certified(x, W, bias, k)
    rows = slice(0, min(B, 256))
    expected, _ = reference.select_topk(x[rows], W, bias, k)
    torch.testing.assert_close(acts[rows].sort(dim=1, descending=True).values, expected, rtol=1e-3, atol=1e-3)
    offsets = torch.arange(0, B * k + 1, k, device=device)
    latents, values = indices.flatten(), acts.flatten()
    scale = 2 / B
    found = fused.reconstruct(values, latents, W, parameters["b_dec"], x, scale)
    n = len(x[rows]) * k
    part = values[:n], latents[:n], offsets[: len(x[rows]) + 1]
    residual = reference.decode(*part, W) - x[rows].float()
    torch.testing.assert_close(found.g[rows], residual * scale, rtol=1e-3, atol=1e-5)
    by_acts = reference.grad_values(residual, W, *part[1:]) * (part[0] > 0)
    torch.testing.assert_close(found.grad_pre_acts[:n] / scale, by_acts, rtol=1e-2, atol=1e-2)
    csc = fused.to_csc(latents, offsets, F)
    by_weights = fused.grad_weights(values, latents, offsets, found.g, F, csc)
    n_some = min(F, 64)
    chosen = (latents < n_some).nonzero().squeeze(1)
    terms = values[chosen, None] * found.g[chosen // k]
    dense = torch.zeros(n_some, d, device=device).index_add_(0, latents[chosen].long(), terms)
    torch.testing.assert_close(by_weights[:n_some], dense, rtol=1e-3, atol=1e-5)

    capacity = min(2 * B * k + 1024, B * F)
    threshold = acts[:, -1].mean()
    above = fused.select_threshold(x, W, bias, threshold, capacity)
    few = reference.pre_activations(x[rows], W, bias) > threshold + 1e-2
    n_above = int((few.sum(1) > above.offsets.diff()[rows]).sum())
    if n_above or int(above.offsets[-1]) > capacity:
        raise AssertionError(f"the threshold's selection misses entries in {n_above} rows, or found too many")
    floor = fused.batch_floor(x, W, bias, k)
    batch_chosen, _, certified = fused.select_batch_topk(x, W, bias, k, floor, capacity)
    if not bool(certified) or int(batch_chosen.offsets[-1]) != B * k:
        raise AssertionError("BatchTopK's selection is not certified")

    states = [fused.AdamState.of(parameters[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    since, n_dead = torch.zeros(F, dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int32, device=device)
    counters = fused.LatentCounters(since, n_dead, 10_000_000)
    schedule = fused.Hyperparameters(torch.tensor([1e-4, 0.1, 0.001, 1.0], device=device))
    stored = torch.randint(-96, 97, x.shape, dtype=torch.int8, device=device)
    scales, places = torch.rand(B, device=device), torch.randperm(B, device=device)
    torch.testing.assert_close(
        fused.dequantise(stored, scales, places, torch.float32), (stored.float() * scales[:, None])[places]
    )

    product = 2 * B * F * d, 2 * (B + F) * d
    calls: dict[str, tuple[Callable[[], object], float, float]] = {
        "select": (lambda: fused.select_topk(x, W, bias, k), *product),
        "reconstruct": (
            lambda: fused.reconstruct(values, latents, W, parameters["b_dec"], x, scale),
            4 * B * k * d,
            B * d * 6 + min(B * k, F) * d * 2,
        ),
        "decode": (lambda: fused.decode(values, latents, offsets, W), 2 * B * k * d, B * d * 4 + min(B * k, F) * d * 2),
        "grad_values": (
            lambda: fused.grad_values(found.g, W, latents, offsets),
            2 * B * k * d,
            B * d * 4 + min(B * k, F) * d * 2,
        ),
        "sort": (lambda: fused.to_csc(latents, offsets, F), 0, 32 * B * k),
        "grad_weights": (
            lambda: fused.grad_weights(values, latents, offsets, found.g, F, csc),
            2 * B * k * d,
            4 * (B + F) * d,
        ),
        "gradients and update": (
            lambda: fused.update(values, found.grad_pre_acts, csc, x, found.g, *states, schedule, counters),
            4 * B * k * d,
            2 * F * d * 26 + 6 * B * d,
        ),
        "select_threshold": (lambda: fused.select_threshold(x, W, bias, threshold, capacity), *product),
        "batch_floor": (lambda: fused.batch_floor(x, W, bias, k), 2 * min(B, 128) * F * d, 2 * F * d),
        "select_batch_topk": (lambda: fused.select_batch_topk(x, W, bias, k, floor, capacity), *product),
        "dequantise": (lambda: fused.dequantise(stored, scales, places), 0, 3 * B * d),
        "normalise": (lambda: fused.normalise(x, parameters["b_dec"], 0.5), 0, 8 * B * d),
        "torch.linear": (lambda: torch.nn.functional.linear(x, W), product[0], product[1] + 2 * B * F),
    }
    counts = csc.starts.diff()
    table: dict[str, Any] = {
        "recomputed_rows": int(failed.sum()),
        "hot_latents": int((counts >= 2 * csc.max_segment).sum()),
        "most_entries": int(counts.max()),
    }
    for name, (call, operations, n_bytes) in calls.items():
        floor_ms = max(operations / options.flops, n_bytes / options.bandwidth) * 1e3
        taken = replayed(call, calls=4)
        bound = "operations" if operations / options.flops > n_bytes / options.bandwidth else "bytes"
        table[name] = {"ms": taken, "floor_ms": floor_ms, "bound": bound, "ratio": taken / floor_ms}
    return table


def card(size: Size, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measure what this card reaches at best: a large product in bfloat16, and a copy within its memory."""
    import torch

    n, n_bytes = (64, 1 << 10) if options.rehearse else (8192, 1 << 31)
    one, other = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = replayed(lambda: one @ other, calls=4), replayed(lambda: target.copy_(source), calls=4)
    return {"flops": 2 * n**3 / product * 1e3, "bytes_per_second": 2 * n_bytes / copy * 1e3}


def step(size: Size, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time a whole step, captured in a CUDA graph and not, once two runs of it agree in every bit; and with AuxK."""
    import torch

    from thresher.train.kernels import triton as fused

    cuda = torch.cuda.is_available()
    parameters, x = make_problem(size, device)
    variance = float(x.float().var(0).sum())
    plain = fused.TopKOptions(size.k, variance)
    if size.d_sae * size.d_in <= 1 << 26:
        first, second = (fused.TopKStep(parameters, plain) for _ in range(2))
        for whole in (first, second):
            whole.set_lr(1e-3)
            whole(x)
        pairs = zip(first.parameters().values(), second.parameters().values(), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise AssertionError("two equal steps differ")
        del first, second, whole
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    whole = fused.TopKStep(parameters, plain)
    whole.set_lr(1e-4)
    before = float(whole(x)[0])
    result: dict[str, Any] = {"eager_ms": milliseconds(lambda: whole(x))}
    if not float(whole(x)[0]) < before:
        raise AssertionError("the loss does not fall")
    if cuda:
        result["ms"] = replayed(lambda: whole(x), calls=2)
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    result["by_kernel"] = profiled(lambda: whole(x))
    del whole
    n_dead = max(1, size.d_sae // 64)
    reviving = fused.TopKOptions(size.k, variance, aux_coefficient=1 / 32, k_aux=size.d_in // 2, dead_after_tokens=1)
    whole = fused.TopKStep(parameters, reviving)
    whole.tokens_since_fired[:n_dead] = 10
    whole(x, n_dead)
    result["auxk_ms"], result["n_dead"] = replayed(lambda: whole(x, n_dead)), n_dead
    return result


def architectures(size: Size, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time a trainer's steps of every kind of selection, replayed as graphs, on batches already there."""
    import torch

    from thresher.train.architectures import make_config
    from thresher.train.architectures.contract import Batch
    from thresher.train.kernels import triton as fused
    from thresher.train.step.sae_trainer import SaeTrainer, Schedule
    from thresher.train.step.step_graphs import capture_on_cuda
    from thresher.train.step.step_numbers import read_metrics
    from thresher.train.stream.normalization import Normalization

    _, x = make_problem(size, device)
    batch = Batch(x.float(), x)
    normalization = Normalization(torch.zeros(size.d_in), 1.0, float(x.float().var(0).sum()))
    recipes: dict[str, dict[str, Any]] = {
        "topk": {"k": size.k},
        "batch_topk": {"k": size.k},
        "matryoshka_batch_topk": {"k": size.k},
        "jumprelu": {"l0_coefficient": 1.0, "target_l0": float(size.k), "sparsity_warmup_steps": 0},
        "gated": {"l1_coefficient": 1.0, "sparsity_warmup_steps": 0},
        "standard": {"l1_coefficient": 1.0, "sparsity_warmup_steps": 0},
    }
    table: dict[str, Any] = {}
    for name, recipe in recipes.items():
        config = make_config(hook_point="x", architecture=name, d_sae=size.d_sae, **recipe)
        capture = capture_on_cuda if device.type == "cuda" else None
        schedule = Schedule(1000, size.batch, 1, 0.0)
        try:
            trainer = SaeTrainer(
                config=config,
                d_in=size.d_in,
                normalization=normalization,
                schedule=schedule,
                kernels=fused.Triton(),
                device=device,
                capture=capture,
            )
            if options.rehearse and name not in REHEARSED:
                continue
            numbers: dict[str, Any] = {}
            # Shapes settle by the second look, and a graph is captured three steps later.
            for _ in range(0 if options.rehearse else 60):
                trainer.step(batch)
            taken = milliseconds(lambda trainer=trainer, numbers=numbers: numbers.update(trainer.step(batch)), 64)
            read = read_metrics(numbers)
            table[name] = {"ms": taken, "l0": read["l0"], "skipped_steps": read.get("skipped_steps", 0)}
        except Exception as error:
            if options.rehearse:
                raise
            table[name] = {"error": repr(error)[:300]}
        trainer = None  # its memory must not come on top of the next one's
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return table


def stream(size: Size, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train from a raw and from an int8 store; return tokens/s and the share of the time spent waiting for data."""
    import tempfile

    import torch

    from thresher.shared.store import ActivationStoreWriter
    from thresher.train import TrainConfig, train

    rates: dict[str, Any] = {}
    context, n_rows = (8, 64) if options.rehearse else (1024, options.store_tokens)
    n_steps = max(2, 4 * n_rows // size.batch)
    for name, codec in (("raw", "none"), ("int8", "int8")):
        with tempfile.TemporaryDirectory() as folder:
            with ActivationStoreWriter(folder + "/store", {"x": size.d_in}, context, codec=codec) as writer:
                block = max(1, min(64, n_rows // context))
                for _ in range(n_rows // (block * context)):
                    writer.append({"x": torch.randn(block, context, size.d_in).to(torch.bfloat16)})
            sae = {"hook_point": "x", "architecture": "topk", "d_sae": size.d_sae, "k": size.k}
            config = TrainConfig(
                store=folder + "/store",
                output=folder + "/saes",
                sae=[sae],
                batch_size=size.batch,
                tokens=n_steps * size.batch,
                device=device.type,
                log_every_steps=max(1, n_steps // 2),
                checkpoint_every_tokens=1 << 40,
            )
            (trained,) = train(config)
            last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
            rates[name] = {key: last[key] for key in ("tokens_per_second", "data_wait_fraction")}
    return rates


def peers(size: Size, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time each peer's step in a process of its own; a peer that cannot run says why."""
    results: dict[str, Any] = {}
    for peer in PEERS if options.peers else ():
        script = str(Path(__file__).with_name("gpu_peers.py"))
        command = [options.peers, script, peer, *map(str, size[:4]), *(["--rehearse"] if options.rehearse else [])]
        results[peer] = run_apart(command)
    return results


SECTIONS: dict[str, Callable[[Size, Any, argparse.Namespace], dict[str, Any]]] = {
    "card": card,
    "kernels": kernels,
    "step": step,
    "architectures": architectures,
    "stream": stream,
    "peers": peers,
}


def run_apart(command: list[str]) -> dict[str, Any]:
    """Run a command and return the JSON of its last line, or what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECTION_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": repr(error)[:300]}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"}


def run_section(section: str, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Run one section here; what goes wrong is its result."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return SECTIONS[section](size, device, options)
    except Exception as error:
        if options.rehearse:
            raise
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    import torch

    if options.rehearse and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        with fit_interpreter():
            run_all(options)
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Run the sections at every size, each in a process of its own, and write the tables; or the one that is asked."""
    import torch

    sizes = REHEARSAL if options.rehearse else SIZES
    if options.size is not None:
        print("\n" + json.dumps(run_section(options.sections[0], sizes[options.size], options)))
        return
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no CUDA device was found; --rehearse runs the same lines without one")
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "sizes": []}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        entry: dict[str, Any] = {"size": size._asdict()}
        report["sizes"].append(entry)
        for section in options.sections:
            # The card is the same for each size; the largest's stores would take longer to write than all else.
            if (section == "card" and number) or (section == "stream" and size.d_in >= 4096):
                continue
            print(
                f"{section} at d={size.d_in} F={size.d_sae} k={size.k} batch {size.batch}", file=sys.stderr, flush=True
            )
            if options.rehearse or section == "peers":
                entry[section] = run_section(section, size, options)
            else:
                own = [
                    f"--{key}={getattr(options, key.replace('-', '_'))}"
                    for key in ("flops", "bandwidth", "store-tokens")
                ]
                entry[section] = run_apart(
                    [sys.executable, __file__, "--size", str(number), "--sections", section, *own]
                )
            options.output.write_text(json.dumps(report, indent=1))
            options.output.with_suffix(".md").write_text(gpu_tables.markdown(report))
    print(gpu_tables.markdown(report))
    print("rehearsed: every line ran; nothing was timed" if options.rehearse else f"written to {options.output}")


if __name__ == "__main__":
    main()
