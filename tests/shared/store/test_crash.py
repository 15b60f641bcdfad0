"""A writer that was killed at any moment and resumed leaves the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def kill(folder: Path, mode: str, count: int, seed: int) -> dict[str, Any]:
    """Run the driver, which kills its children, in a process of its own."""
    script = Path(__file__).with_name("crash_driver.py")
    command = [sys.executable, str(script), str(folder), mode, str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_store_recovers_from_a_kill_before_some_steps_of_the_disk(tmp_path: Path) -> None:
    result = kill(tmp_path, "some-steps", 8, seed=1)
    assert result["problems"] == []
    assert result["kills"] == 8


def test_a_kill_of_an_extension_leaves_the_old_store_or_one_that_resumes(tmp_path: Path) -> None:
    result = kill(tmp_path, "extend-some-steps", 8, seed=3)
    assert result["problems"] == []
    assert result["kills"] == 8


@pytest.mark.long
def test_a_kill_of_an_extension_before_every_step_leaves_the_old_store_or_one_that_resumes(tmp_path: Path) -> None:
    result = kill(tmp_path, "extend-every-step", 10**6, seed=0)
    assert result["problems"] == []
    assert result["kills"] > 70


@pytest.mark.long
def test_a_store_recovers_from_a_kill_before_every_step_of_the_disk(tmp_path: Path) -> None:
    result = kill(tmp_path, "every-step", 10**6, seed=0)
    assert result["problems"] == []
    assert result["kills"] > 150


@pytest.mark.long
def test_a_store_recovers_from_a_kill_at_random_moments(tmp_path: Path) -> None:
    result = kill(tmp_path, "random-time", 60, seed=2)
    assert result["problems"] == []
    assert result["kills"] == 60
