"""`python -m thresher.evaluate`: the same as `thresher evaluate`."""

from ..shared.core.cli import run_process
from .command import main

run_process(main)
