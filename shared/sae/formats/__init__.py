"""Files of SAEs, one module per format: how it is recognised and read. All are read without their libraries.

Every reader refuses by name what it does not understand, so that no key that changes what an SAE computes is ignored.
"""

from __future__ import annotations

from pathlib import Path

from ...core.errors import MissingFileError, SaeError
from ...core.paths import user_path
from . import cross_layer, dictionary_learning, saelens, sparsify
from .files import CONFIG_NAME, WEIGHTS_NAME
from .parts import SaeParts

FORMATS = (cross_layer, saelens, sparsify, dictionary_learning)
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def is_sae(folder: str | Path) -> bool:
    """Return whether a folder has the weights of a format that is known."""
    try:
        return any(fmt.recognises(user_path(folder)) for fmt in FORMATS)
    except OSError:
        return False


def read_sae(path: str | Path) -> SaeParts:
    """Read the SAE in a folder, whose format its files tell; the path of an `ae.pt` stands for its folder.

    Raises:
        MissingFileError: there is none, or one of its files is missing.
        SaeError: it is damaged, or cannot be computed here as its library computes it.
    """
    try:
        return _read(path)
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise SaeError(f"no SAE can be read at '{path}': {error.strerror or error}") from None


def _read(path: str | Path) -> SaeParts:
    folder = user_path(path)
    if folder.name == dictionary_learning.ARCHIVE_NAME and folder.is_file():
        folder = folder.parent
    for fmt in FORMATS:
        if fmt.recognises(folder):
            if not (folder / fmt.CONFIG_NAME).is_file():
                raise MissingFileError(
                    f"no SAE at '{folder}': it has {fmt.weights_name(folder)} but no {fmt.CONFIG_NAME}; copy it there"
                )
            return fmt.read(folder)
    for file in [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []:
        if file.suffix in _PICKLES:
            raise SaeError(
                f"'{file}' is a pickle, which may run code when read; expected safetensors, or the "
                f"{dictionary_learning.ARCHIVE_NAME} that dictionary_learning saves"
            )
    raise MissingFileError(
        f"no SAE at '{path}': expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME} (ours, SAELens), "
        f"{CONFIG_NAME} and {sparsify.WEIGHTS_NAME} (sparsify), or {dictionary_learning.CONFIG_NAME} and "
        f"{dictionary_learning.ARCHIVE_NAME} (dictionary_learning)"
    )


__all__ = ["FORMATS", "SaeParts", "is_sae", "read_sae"]
