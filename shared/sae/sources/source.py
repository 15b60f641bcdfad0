"""Turn what a user writes for an SAE into a path on this machine: a path, `hf://…`, or the name of a release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...core.errors import HubError, SaeError
from ...core.paths import user_path
from ...hub.address import HubAddress, is_hub_address, parse_address
from ...hub.download import HubFile, download
from .releases import find_release
from .transcoder_sets import assemble, parts_of

_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
_DESCRIPTIONS = (".json", ".yaml", ".yml")
_LARGEST_DESCRIPTION = 10 << 20
_ONE_FILE_EACH = re.compile(r"layer_\d+\.safetensors|layer\d+\.sae\.pt")
"""Names of files of which each is an SAE of its own."""
_NOT_SAES = ("sparsity.safetensors",)


class Located(NamedTuple):
    """Where an SAE is on this machine, and what a registry says about it.

    `metadata` are names and `published` figures, and `stated` what changes how its files are read.
    """

    path: Path
    metadata: dict[str, Any]
    stated: Mapping[str, Any] = {}


def local_source(source: str | Path) -> Path:
    """Return the path of a source, which is downloaded if it is on the Hub; raises the errors of `locate_source`."""
    return locate_source(source).path


def locate_source(source: str | Path, several: bool = False) -> Located:
    """Return where a source is on this machine, after downloading it if it is on the Hub.

    With `several`, a folder of the Hub may hold many SAEs, which are all downloaded. So are the parts of a set of
    circuit-tracer that lists their addresses, wherever the set itself is.

    Raises:
        HubError: the Hub does not give it.
        SaeError: a folder of the Hub holds several SAEs, and one is expected.
    """
    if is_hub_address(source):
        return Located(_with_parts(_download(parse_address(str(source)), several), source, several), {})
    path = user_path(source)
    if isinstance(source, str) and "/" in source and not _exists(path):
        release = find_release(source)
        if release is not None:
            return Located(_download(release.address, several), release.metadata, release.stated)
    return Located(_with_parts(path, source, several) if _exists(path) else path, {})


def _with_parts(path: Path, source: str | Path, several: bool) -> Path:
    """Return a path, or the folder of a set whose parts are downloaded from where its configuration says.

    Raises:
        SaeError: the set has several parts, and one SAE is expected.
    """
    try:
        parts = parts_of(path) if path.is_dir() else []
    except OSError:
        return path  # which reading reports
    if not parts:
        return path
    if len(parts) > 1 and not several:
        raise SaeError(f"'{source}' lists {len(parts)} SAEs; name one, such as '{parts[0]}'")
    return assemble(path, parts, lambda part: _download(part, several=False))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return True  # a path that no file system accepts, which reading reports


def _download(address: HubAddress, several: bool) -> Path:
    return download(address, _all_of if several else _one_of)


def _all_of(files: list[HubFile], address: HubAddress) -> list[HubFile]:
    """Return the files of SAEs and what describes them."""
    if any(file.path == address.path for file in files):
        return _one_of(files, address)
    return [file for file in files if _suffix(file) in _WEIGHTS or _describes(file)]


def _one_of(files: list[HubFile], address: HubAddress) -> list[HubFile]:
    """Return the files of the one SAE at an address: a file and what is beside it, or a folder's.

    Raises:
        HubError: there is none.
        SaeError: there are several.
    """
    described = [file for file in files if _describes(file)]
    named = [file for file in files if file.path == address.path]
    if named:
        return [*named, *described]
    weights = [file for file in files if _suffix(file) in _WEIGHTS and file.name not in _NOT_SAES]
    if not weights and any(file.name.endswith((".yaml", ".yml")) for file in described):
        return described  # a set that may list its parts
    if not weights:
        raise HubError(f"no SAE at '{address}': expected weights in {', '.join(_WEIGHTS)}")
    singles = [file for file in weights if _ONE_FILE_EACH.fullmatch(file.name)]
    places = {file.path for file in singles} or {_folder(file) for file in weights}
    if len(places) > 1:
        first = min(places, key=lambda place: (len(place), place))
        raise SaeError(f"'{address}' holds {len(places)} SAEs; name one, such as '{address.at(first)}'")
    return [*weights, *described]


def _folder(file: HubFile) -> str:
    return file.path.rpartition("/")[0].removesuffix("/checkpoints")


def _suffix(file: HubFile) -> str:
    return Path(file.name).suffix


def _describes(file: HubFile) -> bool:
    return _suffix(file) in _DESCRIPTIONS and file.size <= _LARGEST_DESCRIPTION
