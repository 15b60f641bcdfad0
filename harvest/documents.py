"""Text sources: an iterator of named documents, always in the same order for one configuration."""

from __future__ import annotations

import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..shared.errors import DataError, MissingFileError
from .config import HarvestConfig

PYTHON_STDLIB = "python-stdlib"
BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
NAME_COLUMNS = ("path", "name", "title", "url", "id")
MAX_NAME = 200


class Document(NamedTuple):
    """One document and where it is from: a path, a title, or dataset and row.

    A document is plain text, or a conversation (`messages`, dicts with role and content), or already tokenized
    (`input_ids`); `text` is empty for the latter two.
    """

    name: str
    text: str
    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None

    @property
    def kind(self) -> str:
        """What the document holds: "text", "messages" or "token ids"."""
        if self.messages is not None:
            return "messages"
        return "text" if self.input_ids is None else "token ids"


def read_documents(config: HarvestConfig) -> Iterator[Document]:
    """Yield the documents of `config.dataset`.

    Raises `MissingFileError` for a path that is not there and `DataError` for a source without
    usable text.
    """
    path = Path(config.dataset).expanduser()
    if config.dataset == PYTHON_STDLIB:
        return _files(_stdlib_files(), Path(sysconfig.get_paths()["stdlib"]), config.seed)
    if path.is_dir():
        return _folder(path, config)
    if path.is_file():
        builder = BUILDERS.get(_kind(path))
        return _data_files(builder, [path], config) if builder else _files([path], path.parent, config.seed)
    if _looks_like_a_path(config.dataset):
        raise MissingFileError(f"no text at '{config.dataset}'; give a file, a folder, or a Hugging Face dataset id")
    return _rows(_hub_dataset(config), config)


def source_files(config: HarvestConfig) -> list[Path] | None:
    """Return the local files that the documents come from, sorted by path; None for a Hugging Face dataset id."""
    path = Path(config.dataset).expanduser()
    if config.dataset == PYTHON_STDLIB:
        return sorted(_stdlib_files())
    if path.is_dir():
        return _visible_files(path)
    return [path] if path.is_file() else None


def hub_fingerprint(config: HarvestConfig) -> str:
    """Return what identifies the content of a Hugging Face dataset id: the revision's hash, from the cache if offline.

    Raises `DataError` for a dataset that cannot be reached.
    """
    with _reaching(config):
        builder = _datasets().load_dataset_builder(
            config.dataset, config.dataset_config, revision=config.dataset_revision
        )
    return str(builder.hash)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or _kind(Path(name)) in (".txt", *BUILDERS)


def _kind(path: Path) -> str:
    """Return the suffix that tells a file's format, below that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _stdlib_files() -> list[Path]:
    paths = []
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = [name for name in subfolders if name not in NOT_STDLIB]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return paths


def _files(paths: list[Path], root: Path, seed: int) -> Iterator[Document]:
    """Yield text files as documents, shuffled by the seed; a file that is not UTF-8 is passed over."""
    paths = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    random.Random(seed).shuffle(paths)
    skipped = 0
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            continue
        yield Document(path.relative_to(root).as_posix(), text)
    if skipped:
        print(
            f"note: {skipped} of {len(paths)} files under '{root}' are not UTF-8 text and were left out",
            file=sys.stderr,
        )


def _folder(folder: Path, config: HarvestConfig) -> Iterator[Document]:
    """Read a folder: a dataset saved to disk, data files of one format, or else text files."""
    if (folder / "state.json").is_file():
        return _rows(_datasets().load_from_disk(folder), config)
    if (folder / "dataset_dict.json").is_file():
        return _rows(_split(_datasets().load_from_disk(folder), config), config)
    paths = _visible_files(folder)
    builders = {BUILDERS[_kind(path)] for path in paths if _kind(path) in BUILDERS}
    if len(builders) > 1:
        raise DataError(f"'{folder}' mixes {' and '.join(sorted(builders))} files; give a folder of one format")
    if builders:
        return _data_files(builders.pop(), [path for path in paths if _kind(path) in BUILDERS], config)
    if not paths:
        raise DataError(f"no files in '{folder}'; expected text, JSONL, Parquet or Arrow files")
    return _files(paths, folder, config.seed)


def _visible_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _datasets() -> Any:
    """Import `datasets`, a second's work that plain text needs not."""
    import datasets

    return datasets


def _data_files(builder: str, paths: list[Path], config: HarvestConfig) -> Iterator[Document]:
    files = [str(path) for path in paths]
    return _rows(_datasets().load_dataset(builder, data_files=files, split="train", streaming=True), config)


def _hub_dataset(config: HarvestConfig) -> Any:
    with _reaching(config):
        return _datasets().load_dataset(
            config.dataset,
            config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
            streaming=config.streaming,
        )


@contextmanager
def _reaching(config: HarvestConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"cannot load dataset '{config.dataset}': expected {PYTHON_STDLIB}, a file, a folder, or a Hugging Face "
            f"dataset id that can be reached; {reason}"
        ) from None


def _split(loaded: Any, config: HarvestConfig) -> Any:
    if config.split not in loaded:
        raise DataError(f"'{config.dataset}' has no split '{config.split}'; it has {', '.join(loaded)}")
    return loaded[config.split]


def _rows(rows: Any, config: HarvestConfig) -> Iterator[Document]:
    """Yield a dataset's rows; a row is named by its path, name, title, URL or id, or its number."""
    column, name_column = config.text_column, None
    for number, row in enumerate(rows):
        if number == 0:
            if column not in row:
                raise DataError(
                    f"'{config.dataset}' has no column '{column}'; set text_column to one of {', '.join(row)}"
                )
            name_column = next((name for name in NAME_COLUMNS if isinstance(row.get(name), (str, int))), None)
        value = row[column]
        if value is None:
            continue
        name = str(row[name_column])[:MAX_NAME] if name_column else f"row {number}"
        if isinstance(value, str):
            yield Document(name, value)
        elif is_messages(value):
            yield Document(name, "", messages=value)
        elif is_input_ids(value):
            yield Document(name, "", input_ids=value)
        else:
            raise DataError(
                f"column '{column}' of '{config.dataset}' must hold text, a list of messages or a list of token ids, "
                f"got {type(value).__name__} in row {number}"
            )


def is_messages(value: object) -> bool:
    """Tell whether a value is a conversation: a list of dicts that have a role and a content."""
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)


def is_input_ids(value: object) -> bool:
    """Tell whether a value is a list of token ids."""
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
