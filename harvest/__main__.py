"""`python -m thresher.harvest`: the same as `thresher harvest`."""

from ..shared.core.cli import run

run("harvest")
