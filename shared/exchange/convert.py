"""Write SAEs in another format, exactly, or approximately with the loss measured on rows of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.disk import check_writable, replacing_folder
from ..core.errors import ConfigError
from ..sae import Sae
from ..sae.formats import SaeFormat, find_format, find_saes
from ..sae.formats.folding import NotExactError
from .approximate import approximated

_ONE_FOLDER = ("circuit-tracer",)
"""Formats whose layers lie in one folder."""


def convert(
    found: Sequence[tuple[SaeFormat, Path]], root: Path, folder: Path, name: str, store: str | None, n_rows: int
) -> list[str]:
    """Write SAEs below a new folder, each by its path below `root`, and return a line on each.

    With `store`, SAEs that the format cannot hold are approximated, and their loss on `n_rows` held-out rows is stated.
    Nothing is written if one cannot be.

    Raises:
        ConfigError: the folder is there already.
        SaeError: the format cannot hold one of the SAEs.
    """
    fmt = find_format(name)
    check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"'{folder}' is there already; choose a new folder")
    lines = []
    with replacing_folder(folder) as partial:
        for _, path in found:
            within = path.relative_to(root)
            within = within.with_suffix("") if path.is_file() else within
            below = Path() if len(found) == 1 or name in _ONE_FOLDER else within
            shown = path.relative_to(root) if path != root else path.name
            lines.append(f"{shown}: {_write(path, partial / below, fmt, store, n_rows)}")
    return [*lines, f"wrote {len(found)} SAEs in the format {name} to '{folder}'"]


def _write(path: Path, folder: Path, fmt: SaeFormat, store: str | None, n_rows: int) -> str:
    """Write one SAE and return what was kept and lost, in words."""
    source = sae = Sae.load(path)
    said = "computes the same"
    try:
        sae.save(folder, fmt.name)
    except NotExactError:
        if store is None:
            raise
        sae, said = approximated(sae, store, n_rows)
        sae.save(folder, fmt.name)
    written = find_saes(folder)[-1][1]
    again = Sae.load(written)
    if source.is_signed and not again.is_signed:
        said += ", with two latents for each, one of either sign"
    if sae.hook_point and again.reads != sae.reads:
        said += f"; the format does not say where it belongs ({', '.join(sae.reads)}): the path must"
    return said
