"""Time the sampler of synthetic rows beside SAELens's, in turns on one thread, after comparing their law.

    .venv/bin/python benchmarks/synthetic_rows.py [--law synth-16k] [--peers .venv-peers/bin/python]

Both draw which features fire and add up their directions. What is compared first is the mean number of features that
fire per row, which must agree within five standard errors. With `--law synth-16k` the directions of both are made with
two steps of orthogonalisation instead of 100, which costs neither sampler anything.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROWS = {"synth-1k": 8192, "synth-16k": 2048}
ORTHOGONALISATION_STEPS = 2

PEER = """
import json, sys, time, torch
from sae_lens.synthetic import *
from sae_lens.synthetic.synthetic_model import LowRankCorrelationConfig, OrthogonalizationConfig
torch.set_num_threads(1)
law, n, steps = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
model = SyntheticModel(SyntheticModelConfig(
    num_features=law["n_features"], hidden_dim=law["d_in"], bias=law["bias_norm"], seed=law["seed"],
    firing_probability=ZipfianFiringProbabilityConfig(
        exponent=law["zipf_exponent"], max_prob=law["max_probability"], min_prob=law["min_probability"]),
    hierarchy=HierarchyConfig(total_root_nodes=law["n_roots"], branching_factor=law["branching"],
        max_depth=law["depth"], mutually_exclusive_portion=float(law["exclusive_siblings"]),
        compensate_probabilities=law["compensate_probabilities"], scale_children_by_parent=law["scale_by_parent"]),
    orthogonalization=OrthogonalizationConfig(num_steps=steps, lr=law["orthogonalisation_lr"]),
    correlation=LowRankCorrelationConfig(rank=law["correlation_rank"], correlation_scale=law["correlation_scale"]),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=law["first_magnitude"], end=law["last_magnitude"]),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(
        mean=law["magnitude_deviation_mean"], std=law["magnitude_deviation_std"])))
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    values, l0 = [], []
    for first in range(0, n, 1024):
        values = model.activation_generator.sample(min(1024, n - first))
        rows = model.feature_dict(values)
        l0.append((values > 0).sum(1).double())
    seconds = time.perf_counter() - start
    l0 = torch.cat(l0)
    print(json.dumps([seconds, float(l0.mean()), float(l0.std())]), flush=True)
"""


def main() -> None:
    """Print one JSON object with rows per second of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--law", default="synth-16k", choices=ROWS)
    parser.add_argument("--peers", help="Python interpreter of an environment with SAELens; without it only ours runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/synthetic_rows.json"))
    options = parser.parse_args()

    import msgspec
    import torch

    from thresher.shared.synthetic.law import LAWS
    from thresher.shared.synthetic.sampler import Sampler
    from thresher.shared.synthetic.truth import make_truth

    torch.set_num_threads(1)
    n = ROWS[options.law]
    law = msgspec.structs.replace(LAWS[options.law], orthogonalisation_steps=ORTHOGONALISATION_STEPS)
    sampler = Sampler(make_truth(law))
    peer = None
    if options.peers:
        settings = json.dumps(msgspec.to_builtins(law))
        command = [options.peers, "-c", PEER, settings, str(n), str(ORTHOGONALISATION_STEPS)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert peer.stdin
        assert peer.stdout
        assert peer.stdout.readline() == "ready\n"
    ours, theirs = [], []
    for number in range(options.rounds):
        start = time.perf_counter()
        firing = sampler.fire(n, number)
        sampler.activations(firing, n)
        seconds = time.perf_counter() - start
        counts = torch.bincount(firing.row, minlength=n).double()
        ours.append((seconds, float(counts.mean()), float(counts.std())))
        if peer is not None and peer.stdin and peer.stdout:
            peer.stdin.write("go\n")
            peer.stdin.flush()
            theirs.append(json.loads(peer.stdout.readline()))
    result: dict[str, object] = {"law": options.law, "rows_per_s": round(n / min(part[0] for part in ours))}
    result["l0"] = round(sum(part[1] for part in ours) / len(ours), 3)
    if peer is not None and peer.stdin:
        peer.stdin.close()
        peer.wait()
        means = [sum(part[1] for part in found) / len(found) for found in (ours, theirs)]
        error = (2 / (n * options.rounds)) ** 0.5 * ours[0][2]
        if abs(means[0] - means[1]) > 5 * error:
            sys.exit(f"the laws differ: {means[0]:.3f} features fire per row, and {means[1]:.3f} with SAELens")
        result["saelens_rows_per_s"] = round(n / min(part[0] for part in theirs))
        result["saelens_l0"] = round(means[1], 3)
        ratios = sorted(their[0] / our[0] for our, their in zip(ours, theirs, strict=True))
        result["ratio"] = round(ratios[len(ratios) // 2], 1)
    print(json.dumps(result))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
