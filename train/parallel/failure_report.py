"""Report a failure of several processes once: the first process to fail prints the error, the others print nothing."""

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
    """Run `action` as `run_guarded` does, but print a user's error only if no other process has printed one.

    `torchrun` ends all processes as soon as it notices that one has died, so the error is printed before the exit.
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
    """Return whether this process is the first to fail, by the launcher's store; without a store, return True."""
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_PATIENCE, wait_for_workers=False
        )
        return store.add(f"thresher/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return True
