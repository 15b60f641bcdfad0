"""`python -m thresher.train`: the same as `thresher train`."""

from ..shared.core.cli import run_process
from .command import main

run_process(main)
