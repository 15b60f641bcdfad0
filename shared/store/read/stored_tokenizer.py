"""Save a tokenizer with a store and load it again, so that its tokens can be decoded without the model."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...model.language_model import load_tokenizer
from .tokenizer_folder import read_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .reader import ActivationStore

_CONFIG = "tokenizer_config.json"
OF_LOADING = ("name_or_path", "is_local", "local_files_only")
"""Keys that transformers writes and that depend on where the tokenizer was loaded from."""


def serialise_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return the files of `save_pretrained` by name, without the keys that depend on where it was loaded from."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if _CONFIG in files:
        config = {key: value for key, value in json.loads(files[_CONFIG]).items() if key not in OF_LOADING}
        files[_CONFIG] = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return files


def load_stored_tokenizer(store: ActivationStore, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Load a store's tokenizer, or return None if the store has none.

    Its `name_or_path` is the digest of its files. Raises `StoreError` if they are damaged, `ModelError` if they cannot
    be loaded.
    """
    files = read_tokenizer_files(store.files, store.metadata)
    if files is None:
        return None
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    tokenizer.name_or_path = store.metadata["tokenizer_digest"]
    return tokenizer
