"""Measure the cost of a harvest relative to the bare forward pass, with the same batches, dtype and truncation.

    python benchmarks/harvest_overhead.py

Three variants take turns in this process:

- bare: the model, truncated after the last block that is read, on tokenized contexts, one batch at a time with torch's
  threads inside each operator. This is the plain forward pass that one would write.
- bare side by side: the same, with as many parallel batches as in the harvest, each on one core.
- harvest: all of a harvest's work: read and pack the text, run the model, compress, write and flush the store.

`wall_ratio` and `cpu_ratio` compare the harvest with the bare pass, `..._side_by_side` with the bare pass with parallel
batches, which excludes what the harvest gains from running batches in parallel. `text_share` is the CPU time of
reading, tokenizing and packing, measured separately, as a fraction of the harvest's: the saving if the text were
already tokenized. The CPU ratio counts the seconds of all threads of this process, and so shows the cost also on a
shared machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch import nn
from transformers import PreTrainedModel

from thresher.evaluate.features.readout import find_readout
from thresher.harvest.config import HarvestConfig
from thresher.harvest.model.forward import choose_workers
from thresher.harvest.model.plan import HarvestPlan, make_plan
from thresher.harvest.progress import HarvestProgress
from thresher.harvest.reuse import identity
from thresher.harvest.run import open_writer, run_model
from thresher.harvest.tokens.tokens import batch_contexts, read_contexts
from thresher.shared.core.compute.cores import single_threaded_operators
from thresher.shared.core.config import load_config
from thresher.shared.core.interrupt import Interrupt
from thresher.shared.model.hook_points import find_blocks
from thresher.shared.store import ActivationStore, ActivationStoreWriter


@contextmanager
def cut_after(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Remove the blocks after `layer` and the final norm, which a harvest does not run, from the model."""
    found = find_blocks(model)
    assert found is not None
    path, blocks = found
    others = {step.name: nn.Identity() for step in find_readout(model).path}
    kept = {name: model.get_submodule(name) for name in (path, *others)}
    for name, module in ({path: blocks[: layer + 1]} | others).items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in kept.items():
            model.set_submodule(name, module)


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Return the wall and CPU seconds of an action."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def check_equal(config: HarvestConfig, plan: HarvestPlan, batches: list[torch.Tensor]) -> None:
    """Stop if the harvested store differs from what the model computes."""
    store = ActivationStore.open(config.store)
    rows = torch.cat([batch.flatten() for batch in batches])[: store.n_rows]
    tokens = store.tokens(0, store.n_rows)
    assert tokens is not None
    if not torch.equal(tokens.long(), rows):
        sys.exit("the stored tokens are not those of the batches")
    hidden = plan.model(batches[1], output_hidden_states=True).hidden_states
    n = batches[0].numel()
    for name, hook_point in plan.hook_points.items():
        assert hook_point.layer is not None
        stored = store.read(name, n, n + batches[1].numel())
        if not torch.equal(stored, hidden[hook_point.layer + 1].flatten(0, 1).to(stored.dtype)):
            sys.exit(f"the rows stored at {name} are not what the model computes")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--config", default="configs/harvest/demo.toml")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/bench/harvest_overhead.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(HarvestConfig, arguments.config, ["--tokens", str(arguments.tokens)])
    plan = make_plan(config)
    workers = choose_workers(config.workers, plan.model.device)
    packed = batch_contexts(read_contexts(config, plan.tokenizer, plan.group), config.batch_size)
    batches = [torch.from_numpy(batch.tokens).to(plan.model.device, torch.long) for batch in packed]
    last = max(hook_point.layer or 0 for hook_point in plan.hook_points.values())
    base = plan.model.base_model

    def bare() -> None:
        with cut_after(plan.model, last):
            for input_ids in batches:
                base(input_ids=input_ids, use_cache=False)

    def bare_side_by_side() -> None:
        with cut_after(plan.model, last), single_threaded_operators(), ThreadPoolExecutor(workers) as pool:
            list(pool.map(bare_batch, batches))

    def bare_batch(input_ids: torch.Tensor) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():  # which holds for one thread
            base(input_ids=input_ids, use_cache=False)

    def text() -> None:
        for _ in batch_contexts(read_contexts(config, plan.tokenizer, plan.group), config.batch_size):
            pass

    def whole(config: HarvestConfig) -> None:
        contexts = read_contexts(config, plan.tokenizer, plan.group)
        with (
            open_writer(config, plan, identity(config), ActivationStoreWriter) as writer,
            HarvestProgress(writer, config.context_size, config.n_contexts, 0) as progress,
        ):
            run_model(config, plan, writer, contexts, progress, Interrupt().check)

    sides = ("bare", "bare_side_by_side", "harvest", "text")
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)  # the stores go there: elsewhere may be no disk
    with tempfile.TemporaryDirectory(dir=arguments.output.parent.resolve()) as folder:
        for number in range(arguments.rounds + 1):
            here = msgspec.structs.replace(config, store=f"{folder}/{number}")
            actions = (bare, bare_side_by_side, lambda here=here: whole(here), text)
            found = [timed(action) for action in actions]
            if number == 0:
                check_equal(here, plan, batches)  # and the first round only warms up
                continue
            for side, times in zip(sides, found, strict=True):
                seconds[side].append(times)
            shutil.rmtree(here.store)
    n_tokens = sum(batch.numel() for batch in batches)
    result = {"tokens": n_tokens, "threads": arguments.threads, "workers": workers, "rounds": arguments.rounds}
    for kind, column in (("wall", 0), ("cpu", 1)):
        for base_side, suffix in (("bare", ""), ("bare_side_by_side", "_side_by_side")):
            ratios = [h[column] / b[column] for h, b in zip(seconds["harvest"], seconds[base_side], strict=True)]
            result[f"{kind}_ratio{suffix}"] = round(statistics.median(ratios), 4)
            result[f"{kind}_ratios{suffix}"] = [round(ratio, 4) for ratio in ratios]
        for side in sides:
            result[f"{side}_tokens_per_{kind}_second"] = round(
                n_tokens / statistics.median(t[column] for t in seconds[side])
            )
    shares = [t[1] / h[1] for t, h in zip(seconds["text"], seconds["harvest"], strict=True)]
    result["text_share"] = round(statistics.median(shares), 4)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
