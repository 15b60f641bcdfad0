"""Check every Triton kernel against a plain computation of the same, at a small size and at real ones.

`python tools/gpu/kernels.py FILE` prints a line for each check and writes a JSON object: the checks, and the kernels
that none of them launched. Each check runs in a process of its own, forked before CUDA starts, so that one that hangs
or breaks the device costs its own line. `--here` runs them in this process, for compute-sanitizer; `--smallest` at the
smallest size alone; `--rehearse` without a GPU, in Triton's interpreter.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
from interpreter import REHEARSED, fit_interpreter
from torch import Tensor

from thresher.train.kernels import reference
from thresher.train.kernels import triton as fused
from thresher.train.kernels.csc import MAX_SEGMENT

CHECK_SECONDS = 60
DEVICE = "cpu" if REHEARSED else "cuda"


class Shape(NamedTuple):
    """The size of a check."""

    batch: int
    d_sae: int
    d_in: int
    k: int


SHAPES = [Shape(37, 300, 80, 5), Shape(512, 3072, 768, 32), Shape(4096, 24_576, 768, 32)]
REHEARSAL = [Shape(4, 40, 16, 3)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def encoder(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch of which each row has eight strong directions, encoder rows and a bias."""
    W = torch.nn.functional.normalize(random(shape.d_sae, shape.d_in), dim=1)
    generator = torch.Generator(DEVICE).manual_seed(1)
    strong = torch.randint(shape.d_sae, (shape.batch, 8), generator=generator, device=DEVICE)
    x = torch.nn.functional.embedding_bag(strong, W, mode="sum") * 4 + random(shape.batch, shape.d_in, seed=2)
    return x.to(dtype), W.to(dtype), 0.1 * random(shape.d_sae, seed=3)


def exact(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return the pre-activations in float64."""
    return x.double() @ W.double().T + b.double()


def assert_near(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-3, atol: float = 2e-3) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )


def assert_same(found: Any, expected: Any, what: str) -> None:
    if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
        raise AssertionError(what)


def assert_repeats(call: Callable[[], Any], found: Any) -> None:
    assert_same(found, call(), "two runs differ")


class Chosen(NamedTuple):
    """TopK's entries of a batch, of which latent 0 is in every row, and what they were chosen from."""

    x: Tensor
    W: Tensor
    b: Tensor
    values: Tensor
    latents: Tensor
    offsets: Tensor


def chosen_entries(shape: Shape) -> Chosen:
    x, W, b = encoder(shape)
    values, latents = (x.float() @ W.float().T + b).topk(shape.k)
    latents = latents.where(latents != 0, latents[:, :1])
    latents[:, 0] = 0
    offsets = torch.arange(0, shape.batch * shape.k + 1, shape.k, device=DEVICE)
    return Chosen(x, W, b, values.relu().flatten(), latents.int().flatten(), offsets)


def assert_largest(found: Any, x: Tensor, W: Tensor, b: Tensor, k: int) -> None:
    """Fail unless each row's values are its k largest, and are those of the latents named, none of them twice."""
    z = exact(x, W, b)
    assert_near(found[0].sort(descending=True).values, z.topk(k).values.relu(), "values")
    assert_near(found[0], z.gather(1, found[1].long()).relu(), "values of the latents named")
    ordered = found[1].sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise AssertionError("a latent is listed twice")


def select(shape: Shape) -> str:
    recomputed = 0
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.float32 and shape.batch > 1000:
            continue  # exact products of this size take a second
        x, W, b = encoder(shape, dtype)
        b[1:6] += 30.0  # five in one tile
        found = fused.select_topk_certified(x, W, b, shape.k)
        assert_largest(found, x, W, b, shape.k)
        assert_repeats(lambda x=x, W=W, b=b: fused.select_topk_certified(x, W, b, shape.k), found)
        recomputed += int(found[2].sum())
    return f"{recomputed} rows recomputed"


def select_recomputed(shape: Shape) -> str:
    """Put the largest latents of every row into one tile, which lists fewer of them."""
    if shape.k < 32:
        shape = Shape(shape.batch, 300, shape.d_in, 40)
    x, W, b = encoder(shape)
    b[:64] += 50.0
    found = fused.select_topk_certified(x, W, b, shape.k)
    assert_largest(found, x, W, b, shape.k)
    n_failed = int(found[2].sum())
    if n_failed != shape.batch:
        raise AssertionError(f"the certificates of {n_failed} of {shape.batch} rows failed")
    return f"{n_failed} rows recomputed"


def select_not_a_number(shape: Shape) -> None:
    x, W, b = encoder(shape)
    x[1, 3] = float("nan")
    acts, latents, _ = fused.select_topk_certified(x, W, b, shape.k)
    if not acts[1].isnan().any() or acts[0].isnan().any() or acts[2:].isnan().any():
        raise AssertionError("a NaN is lost, or spreads to other rows")
    if not bool(((latents >= 0) & (latents < shape.d_sae)).all()):
        raise AssertionError("a latent is out of bounds")


def select_threshold(shape: Shape) -> str:
    x, W, b = encoder(shape)
    b[:12] += 50.0  # more than a tile has room for
    found = fused.select_threshold(x, W, b, 2.0)
    z = exact(x, W, b)
    near = ((z - 2.0).abs() < 5e-3).sum(1)
    if not bool((((z > 2.0).sum(1) - found.offsets.diff()).abs() <= near).all()):
        raise AssertionError("rows have other counts")
    rows = reference.rows_of(found.offsets, len(found.values))
    assert_near(found.values, z[rows, found.indices.long()], "values", atol=5e-3)
    if not bool(((rows * shape.d_sae + found.indices.long()).diff() > 0).all()):
        raise AssertionError("entries are not ordered by row and latent")
    capacity = len(found.values) - 7
    part = fused.select_threshold(x, W, b, 2.0, capacity)
    assert_same((part.values, part.offsets), (found.values[:capacity], found.offsets), "entries past the capacity")
    return f"{len(found.values)} entries"


def select_batch_topk(shape: Shape) -> None:
    x, W, b = encoder(shape)
    floor = fused.batch_floor(x, W, b, shape.k)
    found, _, certified = fused.select_batch_topk(x, W, b, shape.k, floor, 2 * shape.batch * shape.k + 1024)
    if not bool(certified):
        raise AssertionError("not certified")
    n = int(found.offsets[-1])
    expected = exact(x, W, b).flatten().topk(shape.batch * shape.k).values
    assert_near(found.values[:n].sort(descending=True).values, expected[:n].relu(), "values")


def token_major(shape: Shape) -> None:
    x, W, _, values, latents, offsets = chosen_entries(shape)
    b_dec, scale = 0.1 * random(shape.d_in, seed=5), 2 / shape.batch
    for decoder in (W, W.float()):
        arguments = values, latents, decoder, b_dec, x, scale
        found, expected = fused.reconstruct(*arguments), reference.reconstruct(*arguments)
        for one, other, name in zip(found, expected, ("squared error", "g", "gradient", "L0"), strict=True):
            assert_near(one, other, name, rtol=1e-2, atol=1e-2 * float(other.double().abs().mean()) + 1e-7)
        assert_repeats(lambda arguments=arguments: fused.reconstruct(*arguments), found)
        ours, theirs = (ops.decode(values, latents, offsets, decoder) for ops in (fused, reference))
        assert_near(ours, theirs, "decode")
        ours, theirs = (ops.grad_values(x, decoder, latents, offsets) for ops in (fused, reference))
        assert_near(ours, theirs, "grad_values", rtol=1e-2)
    total = (found.g / scale).square().sum()
    residual = W[: shape.batch].repeat(-(-shape.batch // len(W)), 1)[: shape.batch], found.g, scale, total, 1 / 32
    for one, other in zip(
        fused.auxk_residual(*residual, torch.bfloat16), reference.auxk_residual(*residual, torch.bfloat16), strict=True
    ):
        assert_near(one, other, "AuxK's residual", rtol=1e-2, atol=1e-6)


def feature_major(shape: Shape) -> str:
    _, _, _, values, latents, offsets = chosen_entries(shape)
    # A rehearsal has fewer entries than a segment of the usual length.
    csc = fused.to_csc(latents, offsets, shape.d_sae, min(MAX_SEGMENT, shape.batch // 2))
    by_latent, order = latents.sort(stable=True)
    ends = torch.searchsorted(by_latent, torch.arange(shape.d_sae, device=DEVICE), right=True)
    assert_same((csc.order, csc.starts[1:]), (order, ends), "the order of entries")
    assert_same((csc.rows,), ((order // shape.k).int(),), "the rows of entries")
    g, some = random(shape.batch, shape.d_in, seed=4), min(shape.d_sae, 256)
    found = fused.grad_weights_and_bias(values, latents, offsets, g, shape.d_sae, csc)
    dense = torch.zeros(shape.batch, some, dtype=torch.float64, device=DEVICE)
    chosen, rows = latents < some, reference.rows_of(offsets, len(values))
    dense.index_put_((rows[chosen], latents[chosen].long()), values[chosen].double(), accumulate=True)
    assert_near(found[0][:some], dense.T @ g.double(), "weights", rtol=1e-4)
    assert_near(found[1][:some], dense.sum(0), "bias", rtol=1e-4)
    assert_repeats(lambda: fused.grad_weights_and_bias(values, latents, offsets, g, shape.d_sae, csc), found)
    assert_same((fused.grad_weights(values, latents, offsets, g, shape.d_sae, csc),), found[:1], "weights alone differ")
    by_latent = fused.sum_by_latent(values, latents, offsets, shape.d_sae, csc)
    assert_near(by_latent, found[1], "sum_by_latent", rtol=1e-5, atol=1e-5)
    return f"at most {int(csc.starts.diff().max())} entries of a latent"


def update(shape: Shape) -> None:
    x, W, b, values, latents, offsets = chosen_entries(shape)
    g, by_acts = random(shape.batch, shape.d_in, seed=4) / shape.batch, random(len(values), seed=5) / shape.batch
    csc = fused.to_csc(latents, offsets, shape.d_sae)
    slots = torch.full((shape.d_sae,), -1, dtype=torch.int32, device=DEVICE)
    slots[5:8] = torch.arange(3, dtype=torch.int32, device=DEVICE)
    dense = fused.DenseGradients(slots, *random(2, 3, shape.d_in, seed=6).unbind(), random(3, seed=7))

    def updated(ops: Any, max_norm: float | None, dense: Any) -> list[Tensor]:
        states = [fused.AdamState.of(weight) for weight in (W.float(), b, W.float(), g[0])]
        schedule = torch.tensor([1e-2, 0.1, 0.001, 1.0], device=DEVICE)
        since = torch.arange(shape.d_sae, device=DEVICE)
        counters = fused.LatentCounters(since, torch.zeros((), dtype=torch.int32, device=DEVICE), shape.d_sae // 2)
        hyperparameters = fused.Hyperparameters(schedule, eps=1e-4, decoder_lr_scale=2.5)
        ops.update(values, by_acts, csc, x, g, *states, hyperparameters, counters, max_norm, dense)
        return [getattr(state, name) for state in states for name in ("weight", "mean", "square")] + [*counters[:2]]

    for max_norm, extra in ((None, None), (0.5, dense)):
        found = updated(fused, max_norm, extra)
        for one, other in zip(found, updated(reference, max_norm, extra), strict=True):
            assert_near(one, other, f"clipped to {max_norm}", atol=1e-5)
        assert_repeats(lambda max_norm=max_norm, extra=extra: updated(fused, max_norm, extra), found)


def rows(shape: Shape) -> None:
    generator = torch.Generator(DEVICE).manual_seed(8)
    size = (shape.batch, shape.d_in)
    stored = torch.randint(-127, 128, size, dtype=torch.int8, generator=generator, device=DEVICE)
    scales = random(shape.batch).abs()
    places = torch.randperm(shape.batch, generator=generator, device=DEVICE)
    found = fused.dequantise(stored, scales, places)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    rtol = 0.0 if DEVICE == "cuda" else 2**-7
    assert_near(found, reference.dequantise(stored, scales, places), "dequantise", rtol, atol=0.0)
    x, x_compute = fused.normalise(found, random(shape.d_in), 0.3)
    assert_near(x, (found.double() - random(shape.d_in).double()) * 0.3, "normalise", atol=1e-5)
    assert_near(x_compute, x.to(torch.bfloat16), "normalise to bfloat16", rtol, atol=0.0)


def initial(shape: Shape) -> dict[str, Tensor]:
    W = torch.nn.functional.normalize(random(shape.d_sae, shape.d_in), dim=1)
    zeros = torch.zeros(shape.d_sae, device=DEVICE), torch.zeros(shape.d_in, device=DEVICE)
    return {"W_enc": W.clone(), "b_enc": zeros[0], "W_dec": W, "b_dec": zeros[1]}


def new_step(shape: Shape) -> Any:
    aux = {"aux_coefficient": 1 / 32, "k_aux": min(16, shape.d_sae), "dead_after_tokens": shape.batch}
    options = fused.TopKOptions(shape.k, float(shape.d_in), max_norm=1.0, **aux)
    return fused.Triton.fixed_shapes.topk_step(initial(shape), options, torch.bfloat16)


def whole_step(shape: Shape) -> str:
    x, losses = encoder(shape)[0], []
    for _ in range(2):
        step = new_step(shape)
        step.set_lr(1e-3)
        losses.append([torch.stack(step(x, min(64, shape.d_sae))).tolist() for _ in range(2 if DEVICE == "cpu" else 8)])
    if losses[0] != losses[1]:
        raise AssertionError("two runs differ")
    first, last = losses[0][0][1], losses[0][-1][1]
    if not last < first:
        raise AssertionError(f"mse does not fall: {first} to {last}")
    return f"mse {first:.4g} to {last:.4g}"


def captured_step(shape: Shape) -> str:
    if DEVICE == "cpu":
        return "not without a GPU"
    x, n_dead = encoder(shape)[0], min(64, shape.d_sae)
    launched, replayed, compiling = (new_step(shape) for _ in range(3))
    compiling(x, n_dead)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        numbers = torch.stack(replayed(x, n_dead))
    for n in range(4):
        for step in (launched, replayed):
            step.set_lr(1e-3 * (n + 1))
        expected = torch.stack(launched(x, n_dead))
        graph.replay()
        assert_same((numbers,), (expected,), f"replay {n} differs")
    assert_same(replayed.parameters().values(), launched.parameters().values(), "parameters differ")
    return "4 replays"


CHECKS: tuple[Callable[[Shape], str | None], ...] = (
    select,
    select_recomputed,
    select_not_a_number,
    select_threshold,
    select_batch_topk,
    token_major,
    feature_major,
    update,
    rows,
    whole_step,
    captured_step,
)


def all_kernels() -> set[str]:
    """Return the names of the functions that the backend launches: those of its modules that are named as kernels."""
    found = set()
    for module in pkgutil.iter_modules(fused.__path__):
        for name, value in vars(importlib.import_module(f"{fused.__name__}.{module.name}")).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                found.add(name)
    return found


@contextmanager
def noting_launches(names: set[str]) -> Iterator[None]:
    """Add the names of the kernels that are launched meanwhile."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    cls, method = (GridExecutor, "__call__") if REHEARSED else (JITFunction, "run")
    launch = getattr(cls, method)

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    setattr(cls, method, note)
    try:
        yield
    finally:
        setattr(cls, method, launch)


class Outcome(NamedTuple):
    """Whether a check passed, what it or its failure says, and the kernels that it launched."""

    passed: bool
    says: str
    launched: list[str]


def run_here(check: Callable[[Shape], str | None], shape: Shape) -> Outcome:
    """Run a check in this process."""
    launched: set[str] = set()
    try:
        with noting_launches(launched):
            says = check(shape)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        return Outcome(True, says or "", sorted(launched))
    except Exception as error:
        traceback.print_exc()
        return Outcome(False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", sorted(launched))


def run_apart(check: Callable[[Shape], str | None], shape: Shape) -> Outcome:
    """Run a check in a process of its own."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=lambda: theirs.send(run_here(check, shape)))
    process.start()
    theirs.close()
    try:
        outcome = ours.recv() if ours.poll(CHECK_SECONDS) else Outcome(False, f"no answer in {CHECK_SECONDS} s", [])
    except EOFError:
        outcome = Outcome(False, "the process died", [])
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to write the results")
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("--smallest", action="store_true", help="at the smallest size alone")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at a tiny size")
    options = parser.parse_args()
    run = run_here if options.here or options.rehearse else run_apart
    checks: list[dict[str, Any]] = []
    never = all_kernels()
    with fit_interpreter() if options.rehearse else nullcontext():
        for shape in REHEARSAL if options.rehearse else SHAPES[: 1 if options.smallest else None]:
            for check in CHECKS:
                began = time.perf_counter()
                outcome = run(check, shape)
                never -= set(outcome.launched)
                seconds = round(time.perf_counter() - began, 2)
                result = {"check": check.__name__, "shape": shape, "passed": outcome.passed, "says": outcome.says}
                checks.append(result | {"seconds": seconds})
                verdict = "ok" if outcome.passed else "FAIL"
                print(f"{verdict} {check.__name__} {tuple(shape)} {seconds} s {outcome.says}", flush=True)
                options.file.write_text(json.dumps({"checks": checks, "never_launched": sorted(never)}, indent=1))
    for name in sorted(never):
        print(f"FAIL {name}: no check launched it")
    sys.exit(bool(never) or not all(check["passed"] for check in checks))


if __name__ == "__main__":
    main()
