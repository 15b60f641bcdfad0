"""Upload a store to a data set repository on the Hub, in commits of some files each, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from ...core.errors import StoreError
from ...hub.address import HubAddress, repository_address
from ...hub.download import HubFile, list_files, matches
from ...hub.errors import explained
from ...hub.upload import upload
from ..format.layout import MANIFEST
from ..read.reader import ActivationStore
from .card import store_card

CARD = "README.md"
_FILES_PER_COMMIT = 64
_BYTES_PER_COMMIT = 2 << 30


def push_store(folder: Path, repository: str, license_name: str, private: bool) -> list[str]:
    """Upload a complete store and a card, and return lines to print.

    Files that are there already are not sent again, so that an upload that was interrupted is resumed by the same
    command. The manifest comes last: until then the repository is no store. A store that was extended since can be
    pushed again.

    Raises:
        ConfigError: the repository's name is not USER/NAME.
        StoreError: the store is not complete, or the repository holds another store.
        HubError: the Hub cannot be reached, or refuses the upload.
    """
    address = repository_address(repository, "dataset")
    store = ActivationStore.open(folder)
    if not store.complete:
        raise StoreError(f"the store '{folder}' is unfinished; run its harvest again to complete it, then push it")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _belongs(path, folder))
    with TemporaryDirectory(prefix="thresher-push-") as temporary:
        (Path(temporary) / CARD).write_text(store_card(repository, store, license_name), encoding="utf-8")
        upload(Path(temporary), address, private=private, message="Describe the store")
    there = _there(address, folder)
    waiting = [name for name in names if name not in there or not matches(folder / name, there[name])]
    url = f"hf://datasets/{repository}"
    for batch in _batches(folder, [name for name in waiting if name != MANIFEST]):
        upload(folder, address, message=f"Upload {len(batch)} files of the store", files=[*map(_literal, batch)])
    if MANIFEST in waiting:
        upload(folder, address, message="Upload the manifest", files=[MANIFEST])
    n_bytes = sum((folder / name).stat().st_size for name in waiting)
    return [f"uploaded {len(waiting)} of {len(names)} files, {n_bytes:,} bytes, to {url}"]


def _belongs(path: Path, folder: Path) -> bool:
    """Return whether a path is a file of the store: not a lock, nor what a writer left unfinished."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _there(address: HubAddress, folder: Path) -> dict[str, HubFile]:
    """Return the files of the repository, after a check that it holds this store, or an earlier state of it."""
    from huggingface_hub import hf_hub_download

    with explained(address):
        commit, files = list_files(address)
        there = {file.path: file for file in files}
        if MANIFEST in there:
            path = hf_hub_download(address.repository, MANIFEST, repo_type=address.kind, revision=commit)
            # A manifest is only ever appended to.
            if not (folder / MANIFEST).read_bytes().startswith(Path(path).read_bytes()):
                raise StoreError(f"'{address}' holds another store than '{folder}'; choose another repository")
    return there


def _batches(folder: Path, names: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_bytes = 0
    for name in names:
        size = (folder / name).stat().st_size
        if batch and (len(batch) == _FILES_PER_COMMIT or n_bytes + size > _BYTES_PER_COMMIT):
            yield batch
            batch, n_bytes = [], 0
        batch.append(name)
        n_bytes += size
    if batch:
        yield batch


def _literal(name: str) -> str:
    """Return a pattern that matches this name alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
