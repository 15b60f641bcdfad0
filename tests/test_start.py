"""How commands start and end: they import what they need and no more, and end at once, but properly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IN_CHILD = """
import sys
from thresher.{stage}.command import main
assert main(sys.argv[1:2]) == 0
{then}
print(*sys.modules)
"""
SHAPES = """
import msgspec
from thresher.shared.core.config import load_config
from thresher.train.architectures import make_architecture
from thresher.train.config import TrainConfig
from thresher.train.memory import held_bytes
from thresher.train.sweep.grids import expand_sweep
for sae in expand_sweep(load_config(TrainConfig, sys.argv[2], []).sae):
    small = {"d_sae": 64} | ({"k": 8} if hasattr(sae, "k") else {})
    held_bytes(make_architecture(msgspec.structs.replace(sae, **small), 16), "bfloat16")
"""


def child(code, *arguments):
    return subprocess.run([sys.executable, "-P", "-c", code, *map(str, arguments)], capture_output=True, text=True)


def modules_after(stage, *arguments, then=""):
    """Run a stage in a process of its own; return the names of the modules that it imported."""
    done = child(IN_CHILD.format(stage=stage, then=then), *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")[-2].split())


def test_plain_runs_import_what_they_need(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"def number_{number}():\n    return {number}\n" * 20)
    harvest, train = tmp_path / "harvest.toml", tmp_path / "train.toml"
    harvest.write_text(
        f'model = "{ROOT}/models/stdlib-lm"\ndataset = "{tmp_path}/text"\nhook_points = ["blocks.0.resid_post"]\n'
        f'context_size = 32\ntokens = 2048\nholdout_fraction = 0.2\nstore = "{tmp_path}/store"\ndevice = "cpu"\n'
    )
    train.write_text(
        f'store = "{tmp_path}/store"\noutput = "{tmp_path}/saes"\nbatch_size = 256\ndevice = "cpu"\n'
        '[[sae]]\nhook_point = "blocks.0.resid_post"\nd_sae = 64\nk = [4, 8]\n'
    )
    imported = modules_after("harvest", harvest)
    assert {"torch", "transformers", "pyarrow"} <= imported
    assert not imported & {"datasets", "pandas", "zarr", "thresher.harvest.ranks.multi_process"}
    imported = modules_after("train", train, ROOT / "configs/train/mixed.toml", then=SHAPES)
    assert {"torch", "thresher.train.run", "thresher.train.memory"} <= imported
    unneeded = {"torch._dynamo", "sympy", "triton", "transformers", "datasets", "pandas", "pyarrow", "zarr"}
    assert not imported & unneeded


ENDING = """
import atexit, sys
from thresher.shared.core.cli import run_process

def command(arguments):
    atexit.register(print, "at exit")
    print("out", *arguments)
    print("err", file=sys.stderr, end="")
    {end}

class Lasting:
    def __del__(self):
        print("taken apart")

sys.modules["lasting"] = Lasting()
run_process(command)
"""


@pytest.mark.parametrize("code", [0, 2])
def test_a_command_ends_with_its_code_and_all_that_it_printed(code):
    done = child(ENDING.format(end=f"return {code}"), "a")
    assert (done.returncode, done.stdout, done.stderr) == (code, "out a\nat exit\n", "err")


def test_a_commands_threads_have_the_interpreter_soon():
    done = child(ENDING.format(end="print(sys.getswitchinterval() < 1e-3)"))
    assert "True" in done.stdout.splitlines()


def test_a_bug_ends_a_command_in_pythons_own_way():
    done = child(ENDING.format(end="raise LookupError('a bug')"))
    assert done.returncode == 1
    assert done.stdout == "out\nat exit\ntaken apart\n"
    assert done.stderr.startswith("errTraceback")
    assert done.stderr.endswith("LookupError: a bug\n")


def test_the_collector_looks_again_after_imports_and_forgets_them_until_the_end():
    code = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))
from thresher.shared.core.lazy import fast_imports
for modules in ("json", "torch"):
    with fast_imports():
        print(gc.isenabled(), end=" ")
        __import__(modules)
    print(gc.isenabled(), gc.get_freeze_count() > 0, end=" ")
gc.disable()
with fast_imports():
    pass
print(gc.isenabled())
"""
    done = child(code)
    assert (done.returncode, done.stdout) == (0, "False True False False True True False\n0\n"), done.stderr
