"""A process that builds a feature index is killed (SIGKILL), and the next one ends with the same index.

One process imports everything, then forks a child for every moment; each child kills itself there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import torch

from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStoreWriter

CONTEXT, N_CONTEXTS, D_IN, D_SAE = 8, 12, 6, 20

CHILDREN = """
import json, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from thresher.evaluate.features import build, progress, rows
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore

torch.set_num_threads(1)
root, moments = Path(sys.argv[1]), json.loads(sys.argv[2])
build.BLOCK_ROWS, progress.SECONDS_BETWEEN, progress.SHARE_OF_TIME = 8, 0.0, 1e9
settings = build.FeatureSettings(n_top=3, n_sampled=3, window=4, n_neighbours=2)


def index(output):
    places = {"hook_point": "h", "target": "h"}
    saes = [SimpleNamespace(name=name, sae=Sae.load(root / name), **places) for name in ("topk", "standard")]
    build.build_feature_index(ActivationStore.open(root / "store"), saes, output, settings=settings)


def in_child(output, moment):
    child = os.fork()
    if child == 0:
        if moment is not None:
            kill_at(*moment)
        index(output)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(module, name, call, when):
    place = {"os": os, "build": build, "rows": rows}[module]
    original, calls = getattr(place, name), [0]

    def counted(*arguments, **named):
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if calls[0] == call and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, counted)


codes = [in_child(root / "whole", None)]
for number, moment in enumerate(moments):
    cut = root / f"cut-{number}"
    codes += [in_child(cut, moment), in_child(cut, None)]
codes += [in_child(root / "often", moment) for moment in moments] + [in_child(root / "often", None)]
print(json.dumps(codes))
"""

MOMENTS = [
    ("build", "active_latents", 1, "before"),
    ("build", "active_latents", 9, "before"),
    ("os", "replace", 7, "before"),
    ("os", "replace", 8, "after"),
    ("os", "fsync", 5, "before"),
    ("build", "active_latents", 24, "after"),
    ("build", "write_index", 1, "before"),
    ("rows", "struct", 3, "before"),
    ("build", "write_index", 1, "after"),
    ("build", "write_index", 2, "after"),
]


def test_an_index_killed_at_any_moment_is_the_same_to_the_byte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tokens = np.random.default_rng(0).integers(1, 50, (N_CONTEXTS, CONTEXT)).astype(np.int32)
    with ActivationStoreWriter(tmp_path / "store", {"h": D_IN}, CONTEXT, dtype="float32") as writer:
        writer.append({"h": torch.randn(N_CONTEXTS, CONTEXT, D_IN, generator=generator).numpy()}, tokens)
    for architecture in ("topk", "standard"):
        W_dec = torch.randn(D_SAE, D_IN, generator=generator)
        tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(D_SAE), "W_dec": W_dec}
        sae = Sae(architecture, tensors | {"b_dec": torch.zeros(D_IN)}, hook_point="h", config={"k": 4})
        sae.save(tmp_path / architecture)
    command = [sys.executable, "-W", "ignore", "-c", CHILDREN, str(tmp_path), json.dumps(MOMENTS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout)
    n = len(MOMENTS)
    assert codes[: 2 * n + 1] == [0, *[-signal.SIGKILL, 0] * n], "every moment is reached, and every second run ends"
    assert set(codes[2 * n + 1 : -1]) <= {-signal.SIGKILL, 0}
    assert codes[-1] == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert sorted(whole) == ["standard.parquet", "topk.parquet"]
    for folder in [tmp_path / f"cut-{number}" for number in range(n)] + [tmp_path / "often"]:
        left = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert left == whole, f"{folder.name}: {MOMENTS[int(folder.name[4:])] if folder.name[4:].isdigit() else 'all'}"
