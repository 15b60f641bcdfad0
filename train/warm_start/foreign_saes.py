"""Read the trained SAE that training starts from: any source of `Sae.load`, or a run's output with a folder per SAE."""

from __future__ import annotations

from pathlib import Path

from ...shared.core.errors import MissingFileError
from ...shared.sae import Sae
from ...shared.sae.formats import is_sae
from ...shared.sae.sources import locate_source


def read_trained_sae(path: str | Path, name: str | None = None) -> Sae:
    """Return the SAE at a source, or in its sub-folder `name`; it takes raw activations.

    Raises:
        MissingFileError: there is no SAE.
        SaeError: the SAE is damaged or of an unsupported kind.
        HubError: the Hub does not give it.
    """
    folder = locate_source(path).path
    if not is_sae(folder) and name is not None and is_sae(folder / name):
        folder = folder / name
    try:
        return Sae.load(folder)
    except MissingFileError as error:
        beside = f" and none in its folder '{name}'" if name is not None else ""
        raise MissingFileError(f"no SAE to start from at '{path}'{beside}: {error}") from None
