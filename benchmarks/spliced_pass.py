"""What a pass costs with one SAE in the model, beside the bare pass: the bundled model and one of the demo's SAEs.

    make demo && python benchmarks/spliced_pass.py

Sides take turns in this process over the same tokens of Python's standard library, and their logits must agree bit by
bit before a time is printed: `bare` is the model alone, `run` keeps the latents of every token, `steer` adds to one
latent at every token (its logits differ, and must). `ratio` is the median of a side's times over that of the bare pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from thresher import Add, SaeModel


def main(arguments: list[str]) -> None:
    """Time the sides and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/stdlib-lm")
    parser.add_argument("--sae", default="runs/demo/saes/topk-k32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    lm = SaeModel.open(options.model, [options.sae], device="cpu")
    (hook_point,) = lm.saes
    assert lm.tokenizer is not None
    text = Path(statistics.__file__).read_text(encoding="utf-8")
    ids = lm.tokenizer(text, verbose=False)["input_ids"][: options.batch * options.context]
    tokens = torch.tensor(ids).view(options.batch, options.context)

    def bare() -> torch.Tensor:
        with torch.no_grad():
            return lm.model(input_ids=tokens, use_cache=False).logits

    def run() -> torch.Tensor:
        return lm.run(tokens).logits

    def steer() -> torch.Tensor:
        with lm.steer({(hook_point, 0): Add(5.0)}), torch.no_grad():
            return lm.forward(tokens, torch.full((options.batch,), options.context)).logits

    assert torch.equal(bare(), run()), "the logits with the SAE in the model must be those without"
    assert not torch.equal(bare(), steer()), "a steered latent must change the logits"
    sides: dict[str, Callable[[], torch.Tensor]] = {"bare": bare, "run": run, "steer": steer}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(some) for name, some in times.items()}
    ratios = {f"{name}_ratio": round(medians[name] / medians["bare"], 3) for name in ("run", "steer")}
    print(json.dumps({"tokens": tokens.numel(), "bare_ms": round(1000 * medians["bare"], 1)} | ratios))


if __name__ == "__main__":
    main(sys.argv[1:])
