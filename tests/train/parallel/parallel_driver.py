"""Processes that train together, run as a script by `test_parallel.py`: it imports torch once and forks them.

`parallel_driver.py N MEETING CONFIG[@STEP] ...`: they meet through the file MEETING and train the configurations in
turn; with `@STEP`, until they are at that step of theirs, when all drop the run as if killed. With INTERPRETED=1,
they train by Triton's kernels, interpreted.

`parallel_driver.py N SIGKILL|SIGTERM CONFIG [STEP]`: they meet as those of a launcher do, run the command, and the last
gets the signal at its 17th step, or at STEP.
"""

import importlib.util
import os
import signal
import sys
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist

import thresher.train.lockstep as lockstep
import thresher.train.run as run_module
from thresher.shared.core.config import load_config
from thresher.train import TrainConfig, train
from thresher.train.command import main


class Killed(BaseException):
    """Stands for a kill of all processes: nothing in the program catches it."""


@contextmanager
def interpreted():
    """Train by Triton's kernels, interpreted fast enough, within this context."""
    file = Path(__file__).parents[3] / "tools" / "gpu" / "interpreter.py"
    specification = importlib.util.spec_from_file_location("fit_interpreter", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    from thresher.train.kernels.triton import Triton

    chosen, lockstep.kernels_for = lockstep.kernels_for, lambda device, name: Triton()
    try:
        with module.fit_interpreter():
            yield
    finally:
        lockstep.kernels_for = chosen


def at_step(step, action):
    """Act before a step, counted from 1 in this process."""
    prepare, begun = run_module.prepare_batches, []

    def counted(*arguments):
        begun.append(None)
        if len(begun) == step:
            run_module.prepare_batches = prepare
            action()
        return prepare(*arguments)

    run_module.prepare_batches = counted


def drop():
    raise Killed


def train_together(rank, n, meeting, arguments):
    """Run as one process of several, and train."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n)
    for argument in arguments:
        path, _, step = argument.partition("@")
        if step:
            at_step(int(step), drop)
        try:
            train(load_config(TrainConfig, Path(path), []))
        except Killed:
            pass
    dist.destroy_process_group()
    return 0


def train_to_signal(rank, n, number, path, step="17"):
    """Run as one process of a launcher; the last one gets a signal."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == n - 1:
        at_step(int(step), lambda: os.kill(os.getpid(), number))
    return main([path])


def fork(action, *arguments):
    """Run an action in a process of its own and return its id; the process ends with the action's exit code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with interpreted() if os.environ.get("INTERPRETED") else nullcontext():
            code = action(*arguments)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start():
    """Fork the processes that the command line asks for, and print their exit codes."""
    n, meeting = int(sys.argv[1]), sys.argv[2]
    if meeting in ("SIGKILL", "SIGTERM"):
        # As `torchrun`'s, this store outlives the processes, who tell each other there which was first to end.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
        }
        children = [fork(train_to_signal, rank, n, signal.Signals[meeting], *sys.argv[3:]) for rank in range(n)]
    else:
        children = [fork(train_together, rank, n, meeting, sys.argv[3:]) for rank in range(n)]
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    start()
