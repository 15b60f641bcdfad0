"""Download files from the Hub into its cache, each checked against the checksum that the Hub states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..core.disk import write_file
from ..core.errors import HubError
from ..core.terminal.progress import library_bars
from .address import HubAddress
from .errors import explained, is_unreachable

_PART = 1 << 22


class HubFile(NamedTuple):
    """A file of a repository: its path, its size in bytes and its SHA-256, or the SHA-1 of a small file in Git."""

    path: str
    size: int
    digest: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


def download(address: HubAddress, choose: Callable[[list[HubFile], HubAddress], Iterable[HubFile]]) -> Path:
    """Download what `choose` returns of the files at an address, and return the address's path in the cache.

    Files that are in the cache are not downloaded again. If the Hub cannot be reached, what an earlier download left in
    the cache is used.

    Raises:
        HubError: the Hub cannot be reached and the cache has nothing, there is no such path, access is refused, or a
            file does not match its checksum.
    """
    from huggingface_hub import snapshot_download

    try:
        with explained(address):
            commit, files = list_files(address)
    except HubError as error:
        if not is_unreachable(error):
            raise
        return _cached(address, error)
    with explained(address), library_bars():
        _remember(address, commit)
        root = None
        for file in choose(files, address):
            path = _fetch(address, commit, file)
            root = root or Path(*path.parts[: len(path.parts) - len(Path(file.path).parts)])
        if root is None:
            root = Path(
                snapshot_download(
                    address.repository, repo_type=address.kind, revision=commit, allow_patterns=["does/not/exist"]
                )
            )
    return root / address.path if address.path else root


def _remember(address: HubAddress, commit: str) -> None:
    """Note in the cache which commit a branch or tag is, as `huggingface_hub` does, so that it is found offline."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    revision = address.revision or constants.DEFAULT_REVISION
    if revision != commit:
        folder = repo_folder_name(repo_id=address.repository, repo_type=address.kind)
        write_file(Path(constants.HF_HUB_CACHE) / folder / "refs" / revision, commit.encode())


def _cached(address: HubAddress, error: HubError) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = snapshot_download(
            address.repository,
            repo_type=address.kind,
            revision=address.revision or None,
            local_files_only=True,
            allow_patterns=[address.path, f"{address.path}/*"] if address.path else None,
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise error from None
    path = Path(root) / address.path
    if not path.exists():
        raise error
    return path


def list_files(address: HubAddress) -> tuple[str, list[HubFile]]:
    """Return the commit of an address's revision and the files at and below its path, those beside it if it is a file.

    Raises:
        HubError: what `explained` turns the Hub's errors into.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, repository, kind = HfApi(), address.repository, address.kind
    commit = api.repo_info(repository, revision=address.revision or None, repo_type=kind).sha
    if not commit:
        raise HubError(f"the Hub gives no commit for '{address}'")
    folder: str | None = address.path or None
    if folder:
        found = api.get_paths_info(repository, [folder], revision=commit, repo_type=kind)
        if not found:
            raise HubError(f"no file or folder '{folder}' in 'hf://{repository}' at revision {commit[:8]}")
        if isinstance(found[0], RepoFile):
            folder = folder.rpartition("/")[0] or None
    recursive = folder == (address.path or None)
    tree = api.list_repo_tree(repository, folder, recursive=recursive, revision=commit, repo_type=kind)
    files = [
        HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile)
    ]
    for file in files:
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise HubError(f"'hf://{repository}' has a file named '{file.path}', which leads out of a folder")
    return commit, files


def _fetch(address: HubAddress, commit: str, file: HubFile) -> Path:
    """Download a file unless it is in the cache, and check it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    kind = address.kind
    cached = try_to_load_from_cache(address.repository, file.path, revision=commit, repo_type=kind)
    if isinstance(cached, str):
        return Path(cached)
    path = Path(hf_hub_download(address.repository, file.path, revision=commit, repo_type=kind))
    if not matches(path, file):
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise HubError(
            f"'{address.at(file.path)}' does not match the checksum that the Hub states, and was removed from the "
            "cache; run the same command again"
        )
    return path


def matches(path: Path, file: HubFile) -> bool:
    """Return whether a file has the size and the digest that the Hub states: SHA-256, or Git's SHA-1."""
    size = path.stat().st_size
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as content:
        while part := content.read(_PART):
            digest.update(part)
    return size == file.size and digest.hexdigest() == file.digest
