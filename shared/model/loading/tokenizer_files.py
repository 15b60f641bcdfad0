"""Find the vocabulary files of a tokenizer.

If a model comes without a vocabulary, most tokenizer classes of transformers 5 build a tokenizer from a few special
tokens instead. BERT's then reads every word as `[UNK]`.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

# Files that transformers can convert to any tokenizer class, whatever that class's own files are called.
_ANY_CLASS = {"tokenizer.json", "tokenizer.model*", "tiktoken.model", "tekken.json"}
_OF_SOME_CLASS = {"*.model", "*.spm", "*.tiktoken", "*.codes", "vocab*.json", "vocab.txt", "merges.txt"}
_NOT_VOCABULARY = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "normalizer.json"}


def vocabulary_files(
    name: str, revision: str | None = None, tokenizer_class: type[Any] | None = None
) -> list[str] | None:
    """Return the names of the vocabulary files in a model's folder, or in its snapshot in the cache.

    With `tokenizer_class`, return the files that this class reads; otherwise those that any class reads. Returns None
    if there is neither a folder nor a snapshot.
    """
    own = dict(getattr(tokenizer_class, "vocab_files_names", None) or {}).values()
    patterns = _ANY_CLASS | (_OF_SOME_CLASS if tokenizer_class is None else set(own) - _NOT_VOCABULARY)
    folder = _folder(name, revision)
    if folder is None:
        return None
    return sorted(path.name for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns))


def needs_no_vocabulary(tokenizer_class: type[Any]) -> bool:
    """Return whether a tokenizer class needs no vocabulary file because it reads bytes or characters (CANINE)."""
    return not getattr(tokenizer_class, "vocab_files_names", None)


def _folder(name: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    for file in ("config.json", "tokenizer_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None
