"""How the launcher (`torchrun`, or another that sets its variables) started this process. Does not import PyTorch."""

from __future__ import annotations

import os


def n_launched() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first_launched() -> bool:
    """Return whether this is the launcher's first process, or the only one."""
    return n_launched() == 1 or os.environ["RANK"] == "0"


def local_position(rank: int, n: int) -> tuple[int, int]:
    """Return this process's number among those of its machine, and how many they are, for process `rank` of `n`."""
    if n == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", n))


def silence_connection_logs() -> None:
    """Suppress the C++ stack traces that PyTorch logs when a connection drops; our own error reports it.

    PyTorch reads the level when it is loaded.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
