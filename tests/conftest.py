"""Choose Triton's interpreter for its kernels if there is no GPU, before anything imports Triton.

Without a CUDA device the tests that need one are skipped, and one line says so. Tests that ask the peer libraries run
scripts in an environment of theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import shape_checks

RANKS_DRIVER = Path(__file__).parent / "harvest" / "ranks" / "ranks_driver.py"
RANKS_CONFIG = """
model = "{model}"
dataset = "{text}"
hook_points = ["blocks.1.resid_post", "blocks.0.mlp_out"]
store = "store"
tokens = 661
context_size = 8
batch_size = 5
holdout_fraction = 0.35
dtype = "float32"
chunk_bytes = 2048
shard_bytes = 4096
model_dtype = "float32"
"""
PEERS = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"


def pytest_configure(config):
    shape_checks.install()
    if config.option.markexpr.strip() != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu`, ignore files without GPU tests: they import libraries that may not be installed."""
    if config.option.markexpr.strip() != "gpu" or collection_path.suffix != ".py":
        return None
    folders = [folder for folder in collection_path.parents if folder.is_relative_to(Path(__file__).parent)]
    files = [collection_path, *(folder / "conftest.py" for folder in folders if folder != Path(__file__).parent)]
    return None if any(file.exists() and "mark.gpu" in file.read_text() for file in files) else True


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr.strip() != "gpu":
        return
    import torch

    if not torch.cuda.is_available():
        config.stash[_SKIPPED] = len(items)
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device was found"))


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(_SKIPPED, 0):
        terminalreporter.write_line("no CUDA device was found: the tests that need one were skipped")


@pytest.fixture(autouse=True)
def _shown_logs():
    """Show messages as the command line does, so that tests that call a stage's function see them on stderr."""
    from thresher.shared.core.terminal.logs import LogSettings, shown_logs

    with shown_logs(LogSettings()):
        yield


@pytest.fixture(scope="session")
def run_peers():
    """The function that runs Python in the peers' environment, without a network, and returns what it prints."""
    if not PEERS.exists():
        pytest.skip("needs the peers' environment (make test-peers)")
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONSAFEPATH": "1"}

    def run(*arguments, **environment):
        command = [str(PEERS), "-W", "ignore", *map(str, arguments)]
        environment = os.environ | offline | environment
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def ranks_config(tmp_path):
    """The function that writes the configuration of the harvests that ranks make of a model and a text."""

    def write(model, text):
        path = tmp_path / "harvest.toml"
        path.write_text(RANKS_CONFIG.format(model=model, text=text))
        return path

    return write


@pytest.fixture(scope="session")
def play_ranks():
    """The function that runs the driver, which forks the ranks, in a process of its own, and returns what it found."""

    def play(toml, *arguments):
        command = [sys.executable, str(RANKS_DRIVER), str(toml), *arguments]
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return play


_SKIPPED = pytest.StashKey[int]()
