"""`python -m thresher.harvest`: the same as `thresher harvest`."""

from ..shared.core.cli import run_process
from .command import main

run_process(main)
