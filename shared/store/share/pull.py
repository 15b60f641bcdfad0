"""Download a store from a data set repository on the Hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ...core.disk import check_writable, writing
from ...core.errors import ConfigError, HubError, StoreError
from ...hub.address import parse_address
from ...hub.download import list_files, matches
from ...hub.errors import explained
from ..format.layout import MANIFEST
from .push import CARD

_NOT_STORED = (CARD, ".gitattributes")


def pull_store(source: str, folder: Path) -> list[str]:
    """Download a store into a new folder, and return lines to print.

    Files are checked against the Hub's checksums. They gather in a hidden folder beside it, from which the same command
    resumes; the folder appears when all are there.

    Raises:
        ConfigError: the folder is there already, or the source is not a data set on the Hub.
        StoreError: the repository holds no store.
        HubError: the Hub does not give it, or a file does not match its checksum.
    """
    from huggingface_hub import hf_hub_download

    if not source.startswith("hf:/"):
        raise ConfigError(f"'{source}' is not on the Hub; expected hf://datasets/USER/NAME@revision")
    address = parse_address(source)
    if address.kind != "dataset" or address.path:
        raise ConfigError(f"'{source}' is not a data set on the Hub; expected hf://datasets/USER/NAME@revision")
    check_writable(folder)
    if folder.exists():
        raise ConfigError(f"'{folder}' is there already; choose a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    with explained(address):
        commit, files = list_files(address)
        files = [file for file in files if file.path not in _NOT_STORED]
        if MANIFEST not in {file.path for file in files}:
            raise StoreError(f"'{address}' has no {MANIFEST}: it holds no store, or one whose upload is unfinished")
        for file in files:
            path = partial / file.path
            if path.is_file() and matches(path, file):
                continue
            hf_hub_download(address.repository, file.path, repo_type=address.kind, revision=commit, local_dir=partial)
            if not matches(path, file):
                path.unlink()
                raise HubError(
                    f"'{address.at(file.path)}' does not match the checksum that the Hub states, and was removed; "
                    "start the same command again"
                )
    with writing(folder):
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        os.replace(partial, folder)
    n_bytes = sum(file.size for file in files)
    return [
        f"downloaded {len(files)} files, {n_bytes:,} bytes, to '{folder}'",
        f"check it: thresher store verify {folder}",
    ]
