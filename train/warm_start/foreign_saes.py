"""Read the trained SAE that training starts from: a folder, or a run's output with a folder per SAE."""

from __future__ import annotations

from pathlib import Path

from ...shared.core.errors import MissingFileError
from ...shared.core.paths import user_path
from ...shared.sae import Sae
from ...shared.sae.formats import is_sae


def read_trained_sae(path: str | Path, name: str | None = None) -> Sae:
    """Return the SAE in a folder, or in its sub-folder `name`; it takes raw activations.

    Raises:
        MissingFileError: there is no SAE.
        SaeError: the SAE is damaged or of an unsupported kind.
    """
    folder = user_path(path)
    if not is_sae(folder) and name is not None and is_sae(folder / name):
        folder = folder / name
    try:
        return Sae.load(folder)
    except MissingFileError as error:
        beside = f" and none in its folder '{name}'" if name is not None else ""
        raise MissingFileError(f"no SAE to start from at '{path}'{beside}: {error}") from None
