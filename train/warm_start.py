"""Start training from trained SAEs of any library, so that the first step reconstructs what they reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shared.core.errors import MissingFileError, SaeError
from ..shared.sae import Sae
from ..shared.sae.formats import is_sae
from ..shared.sae.sources import locate_source
from .architectures import Architecture

if TYPE_CHECKING:
    from .config import SaeConfig
    from .step.sae_trainer import SaeTrainer


def initialise_trainers(trainers: Sequence[SaeTrainer], init_from: str | None) -> list[tuple[str, str]]:
    """Start each trainer from the SAE that its table or the run names; trainers without one keep random weights.

    Return what the first step does not reproduce: pairs of an SAE's name and a line for the user.

    Raises:
        MissingFileError: there is no SAE to start from.
        SaeError: the SAE does not fit.
    """
    notes = []
    for trainer in trainers:
        if source_of(trainer.config, init_from) is not None:
            sae = read_initial(trainer.config, init_from, trainer.architecture)
            normalization = trainer.normalization.to("cpu")
            parameters, buffers = trainer.architecture.imported(sae, normalization)
            found = trainer.architecture.differences(sae, normalization)
            source = source_of(trainer.config, init_from)
            notes += [(trainer.name, f"SAE '{trainer.name}' starts from '{source}', but {text}") for text in found]
            trainer.initialise(trainer.architecture.part_here(parameters), buffers)
    return notes


def source_of(config: SaeConfig, init_from: str | None) -> str | None:
    """Return the path that an SAE starts from, or None."""
    return config.init_from or init_from


def read_initial(config: SaeConfig, init_from: str | None, architecture: Architecture[Any]) -> Sae:
    """Return the SAE to start from, which has the architecture's kind and sizes.

    Raises:
        MissingFileError: there is no SAE.
        SaeError: the SAE does not fit.
    """
    path = source_of(config, init_from)
    assert path is not None
    sae = read_trained_sae(path, config.name)
    expected = architecture.saved_name
    if sae.architecture != expected:
        raise SaeError(
            f"SAE '{config.name}' cannot start from '{path}': that is a '{sae.architecture}' SAE; "
            f"expected '{expected}', as '{config.architecture}' is saved"
        )
    found, wanted = ({"d_in": a.d_in, "d_sae": a.d_sae, "d_out": a.d_out} for a in (sae, architecture))
    if found != wanted:
        differing = ", ".join(
            f"{key} {found[key]}, expected {wanted[key]}" for key in found if found[key] != wanted[key]
        )
        raise SaeError(f"SAE '{config.name}' cannot start from '{path}': it has {differing}")
    try:
        architecture.check_source(sae)
    except SaeError as error:
        raise SaeError(f"SAE '{config.name}' cannot start from '{path}': {error}") from None
    return sae


def read_trained_sae(path: str | Path, name: str | None = None) -> Sae:
    """Return the SAE at a source, or in its sub-folder `name`; it takes raw activations.

    Raises:
        MissingFileError: there is no SAE.
        SaeError: the SAE is damaged or of an unsupported kind.
        HubError: the Hub does not give it.
    """
    folder = locate_source(path, several=name is not None).path
    if not is_sae(folder) and name is not None and is_sae(folder / name):
        folder = folder / name
    try:
        return Sae.load(folder)
    except MissingFileError as error:
        beside = f" and none in its folder '{name}'" if name is not None else ""
        raise MissingFileError(f"no SAE to start from at '{path}'{beside}: {error}") from None
