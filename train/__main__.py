"""`python -m thresher.train`: the same as `thresher train`."""

from ..shared.core.cli import run

run("train")
