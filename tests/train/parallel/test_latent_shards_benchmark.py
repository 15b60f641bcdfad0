"""The benchmark of steps over divided latents runs here on two processes, and checks what it times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "latent_shards.py"
SIZE = ["--d-in", "16", "--d-sae", "64", "--k", "4", "--batch-size", "32", "--rounds", "2"]


@pytest.mark.long
@pytest.mark.parametrize("apart", [False, True])
def test_it_times_both_ways(tmp_path, apart):
    file = tmp_path / "shards.json"
    command = [sys.executable, str(SCRIPT), *SIZE, "--output", str(file), *(["--apart"] if apart else [])]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(file.read_text())
    assert found["exchanged_bytes"] == 4 * 2 * 32 * 4 + 2 * 4 * 32 * 16
    assert found["together_ms"] > 0
    assert ("alone_ms" in found) is ("share_ms" in found) is not apart
