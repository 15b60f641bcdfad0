"""`python -m thresher.evaluate`: the same as `thresher evaluate`."""

from ..shared.core.cli import run

run("evaluate")
