"""The GPU check runs every line of its scripts here, and a step that fails is reported and does not stop the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for a Python in which most scripts break, each in another way.
PYTHON = """#!/bin/sh
case "$*" in
  *tools/gpu/trainers.py*) echo "no such | card" >&2; exit 3 ;;
  *tools/gpu/kernels.py*) exit 139 ;;
  *benchmarks/gpu_step.py*) exit 124 ;;
  *thresher.train*|*thresher.evaluate*) exit 2 ;;
esac
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def page_module():
    file = ROOT / "tools" / "gpu" / "page.py"
    specification = importlib.util.spec_from_file_location("gpu_check_page", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run_check(tmp_path, python, **environment):
    environment = os.environ | {"REHEARSE": "1", "PY": python, "OUT": str(tmp_path / "out")} | environment
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", "tools/gpu_check.sh"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def steps_of(page):
    rows = [line.split(" | ") for line in page.split("## ")[0].splitlines() if line.startswith("| ")]
    return {name.removeprefix("| "): result for name, result, *_ in rows[1:]}


def test_every_line_runs_without_a_gpu(tmp_path):
    done = run_check(tmp_path, sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = steps_of(done.stdout)
    assert list(steps) == ["kernels", "whole steps", "trainers", "harvest", "train", "evaluate"]
    assert set(steps.values()) == {"passed"}
    assert done.stdout == (tmp_path / "out" / "page.md").read_text()
    for line in (
        "# Rehearsal of the GPU check",
        "| select_recomputed | 4, 40, 16, 3 | passed | 4 rows recomputed |",
        "| topk | equal |",
        "| **whole step** |",
        "trained 6 SAEs on 8,192 tokens",
    ):
        assert line in done.stdout
    report = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert report["never_launched"] == []
    # The source of this checkout was run, not an installed package.
    assert (tmp_path / "out" / "site" / "thresher" / "train").resolve() == ROOT / "train"


def test_steps_that_fail_are_reported_and_the_rest_runs(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("not a wheel")
    done = run_check(tmp_path, str(python), WHEELS=str(wheels))
    assert done.returncode == 1
    steps = steps_of(done.stdout)
    assert steps["install broken"].startswith("**failed**")
    assert steps["kernels"] == "**failed**, exit status 139"
    assert steps["whole steps"] == "**out of time**"
    assert steps["trainers"] == "**failed**, exit status 3"
    assert steps["harvest"] == "passed"
    assert steps["train"] == steps["evaluate"] == "**failed**, exit status 2"
    assert "no such | card" in done.stdout.split("## What failed steps said last")[1]


def test_a_folder_of_other_files_is_not_emptied(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("chapter 1")
    done = run_check(tmp_path, sys.executable)
    assert done.returncode == 2
    assert "has files that no check left there" in done.stderr
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_kernel_that_no_check_launches_is_a_failure(page_module):
    check = {"check": "select", "shape": [4, 40, 16, 3], "passed": False, "says": "a | b", "seconds": 1.0}
    lines = page_module.kernels({"checks": [check], "never_launched": ["new_kernel"]})
    assert lines[0] == "0 of 1 checks passed."
    assert "**No check launched** new_kernel." in lines
    assert lines[-1] == "| select | 4, 40, 16, 3 | **failed** | a / b |"


def test_the_page_shows_trainers_that_differ_and_what_a_failed_capture_left(page_module):
    figures = {"ms": 1.5, "l0": 32.0, "graphs": 2, "skipped_steps": 1.0}
    pair = {"by_launches": figures, "by_graphs": figures | {"ms": 1.25}}
    lines = page_module.trainers(
        {
            "topk": pair | {"same_bits": False},
            "gated": {"error": "RuntimeError: out of memory"},
            "fused_step": {"loss": 1.0, "loss_op_by_op": 2.0, "near": False},
            "failed_capture": {"message": "not permitted", "stream_restored": True, "bytes_kept": 0},
        }
    )
    assert "| topk | **differ** | 1.500 | 1.250 | L0 32.0, 2 graphs, 1 steps skipped |" in lines
    assert "| gated | **failed** | | | RuntimeError: out of memory |" in lines
    assert "TopK's loss by fused steps is 1.00000, **far from** 2.00000 op by op." in lines
    assert lines[-1] == "After a capture that fails: stream restored: True, bytes kept: 0 (not permitted)."


def test_the_page_joins_the_parts_of_the_times(page_module, tmp_path):
    size = {"d_in": 768, "d_sae": 24576, "k": 32, "batch": 4096, "floor_ms": 0.6}
    step = {"ms": 0.9, "eager_ms": 1.5, "auxk_ms": 1.2, "n_dead": 9, "peak_bytes": 2 << 30}
    select = {"ms": 0.3, "floor_ms": 0.2, "bound": "operations", "ratio": 1.5}
    kernels = {"select": select, "recomputed_rows": 0, "hot_latents": 1, "most_entries": 5}
    parts = {"step.json": {"step": step}, "by_kernel.json": {"kernels": kernels}}
    for name, part in parts.items():
        report = {"device": "a card", "torch": "2", "sizes": [{"size": size} | part]}
        (tmp_path / name).write_text(json.dumps(report))
    table = "\n".join(page_module.times(tmp_path))
    assert table.count("### d=768") == 1
    assert "1.50x the floor of 0.6; target 1.7x: met" in table
    assert "| select | 0.300 | 1.50x its floor of 0.200, of operations |" in table
