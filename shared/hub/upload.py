"""Upload folders to a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import HubError, one_line
from ..core.terminal.progress import library_bars
from .address import HubAddress
from .errors import explained


def upload(
    folder: Path,
    address: HubAddress,
    *,
    private: bool = False,
    message: str = "Upload with thresher",
    files: list[str] | None = None,
) -> str:
    """Upload a folder's files, or those named, in one commit, and return the commit's URL.

    The repository is made if there is none.

    Files that are there already with the same content are not sent again.

    Raises:
        HubError: the Hub cannot be reached, or refuses the upload.
    """
    from huggingface_hub import HfApi

    with explained(address), library_bars():
        api = HfApi()
        api.create_repo(address.repository, repo_type=address.kind, private=private or None, exist_ok=True)
        try:
            commit = api.upload_folder(
                repo_id=address.repository,
                folder_path=folder,
                path_in_repo=address.path or None,
                repo_type=address.kind,
                revision=address.revision or None,
                commit_message=message,
                allow_patterns=files,
            )
        except RuntimeError as error:  # a large file's upload, with the reason as its cause
            raise HubError(f"{one_line(error, 160)} ({one_line(_cause(error), 160)})") from None
    return str(commit.commit_url)


def _cause(error: Exception) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else error
