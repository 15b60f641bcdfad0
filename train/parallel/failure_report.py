"""One line for a run of many processes that ends with an error: the first to notice says why, the others nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ...shared.core.cli import USAGE_ERROR, run_guarded
from ...shared.core.errors import ThresherError
from ...shared.core.interrupt import Interrupt

_PATIENCE = timedelta(seconds=5)


def report_failure_once(action: Callable[[], Any]) -> int:
    """Run `action` as `run_guarded` does, but print a user's error only where no other process has.

    `torchrun` ends all processes as soon as it sees that one has died; what they have to say, they say first.
    """
    with Interrupt():
        return run_guarded(lambda: _quiet_unless_first(action))


def _quiet_unless_first(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (ThresherError, KeyboardInterrupt):
        if _is_first():
            raise
        return USAGE_ERROR


def _is_first() -> bool:
    """Ask the launcher's store, which outlives the processes; without one, everyone is."""
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_PATIENCE, wait_for_workers=False
        )
        return store.add(f"thresher/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return True
