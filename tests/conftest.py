"""Before anything imports Triton: without a GPU its kernels run in Triton's interpreter."""

from __future__ import annotations

import os


def pytest_configure(config):
    if config.option.markexpr.strip() != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
