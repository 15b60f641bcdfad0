"""Before anything imports Triton: without a GPU its kernels run in Triton's interpreter.

Without a CUDA device the tests that need one are skipped, and one line says so.
"""

from __future__ import annotations

import os

import pytest


def pytest_configure(config):
    if config.option.markexpr.strip() != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


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


_SKIPPED = pytest.StashKey[int]()
