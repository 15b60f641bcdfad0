"""How far attribution ranks latents as their exact ablation does: the bundled model and one of the demo's SAEs.

    make demo && python benchmarks/attribution_ranks.py

For each prompt, the metric is the logit of the likeliest next token minus that of the second. One line for each method:
the mean over prompts of the rank correlation with the ablation of each active latent at each token, and of the relative
error `|estimate - ablation| / |ablation|`.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from torch import Tensor

from thresher import LogitDifference, SaeModel

PROMPTS = (
    "def read(path):",
    "import os\nimport",
    "class Foo(object):\n    def __init__(self",
    "for i in range(",
    "    return self._name ==",
    "try:\n    value = int(text)\nexcept",
    "with open(path) as f:\n   ",
    "if not isinstance(value, str):\n    raise",
    "# Licensed under the",
    "assert len(args) == 2\nx, y =",
)
PATHS = ((1, 10), (10, 1), (32, 1), (32, 2))
"""Groups and steps of integrated gradients."""


def ranks(values: Tensor) -> Tensor:
    """Return each value's rank."""
    return values.argsort().argsort().double()


def main(arguments: list[str]) -> None:
    """Print one line of JSON for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/stdlib-lm")
    parser.add_argument("--sae", default="runs/demo/saes/topk-k32")
    options = parser.parse_args(arguments)
    lm = SaeModel.open(options.model, [options.sae], device="cpu")
    (hook_point,) = lm.saes
    found: dict[str, list[tuple[float, float]]] = {}
    for prompt in PROMPTS:
        run = lm.run(prompt)
        metric = LogitDifference(*run.logits[0, -1].topk(2).indices.tolist())
        exact = lm.ablate(run, metric).latents[hook_point].values()
        estimates = {"gradient times activation": lm.attribute(run, metric)}
        for groups, steps in PATHS:
            scores = lm.attribute(run, metric, "integrated_gradients", groups=groups, steps=steps)
            estimates[f"integrated gradients, {groups} groups, {steps} steps"] = scores
        for name, scores in estimates.items():
            estimate = scores.latents[hook_point].values()
            rank = torch.corrcoef(torch.stack([ranks(exact), ranks(estimate)]))[0, 1]
            found.setdefault(name, []).append((float(rank), float((exact - estimate).norm() / exact.norm())))
    for name, values in found.items():
        rank, error = torch.tensor(values).mean(dim=0).tolist()
        print(json.dumps({"method": name, "rank_correlation": round(rank, 3), "relative_error": round(error, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])
