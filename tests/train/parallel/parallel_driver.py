"""Processes that train together, run as a script by `test_parallel.py`: it imports torch once and forks them.

`parallel_driver.py N MEETING CONFIG[@STEP] ...`: they meet through the file MEETING and train the configurations in
turn; with `@STEP`, until they are at that step of theirs, when all drop the run as if killed.

`parallel_driver.py N SIGKILL|SIGTERM CONFIG`: they meet as those of a launcher do, run the command, and the last gets
the signal at its 17th step.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

import thresher.train.run as run_module
from thresher.shared.core.config import load_config
from thresher.train import TrainConfig, train
from thresher.train.command import main


class Killed(BaseException):
    """Stands for a kill of all processes: nothing in the program catches it."""


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


def train_to_signal(rank, n, path, number):
    """Run as one process of a launcher; the last one gets a signal."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == n - 1:
        at_step(17, lambda: os.kill(os.getpid(), number))
    return main([path])


def fork(action, *arguments):
    """Run an action in a process of its own and return its id; the process ends with the action's exit code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = action(*arguments)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


n, meeting = int(sys.argv[1]), sys.argv[2]
if meeting in ("SIGKILL", "SIGTERM"):
    # As `torchrun`'s, the launcher's store outlives the processes, who tell each other there which was first to end.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
    }
    children = [fork(train_to_signal, rank, n, sys.argv[3], signal.Signals[meeting]) for rank in range(n)]
else:
    children = [fork(train_together, rank, n, meeting, sys.argv[3:]) for rank in range(n)]
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
