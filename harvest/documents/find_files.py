"""Find the local files that a configuration reads, and those that it leaves out."""

from __future__ import annotations

import json
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...shared.core.errors import ConfigError, DataError, MissingFileError
from ...shared.core.paths import user_path
from ...shared.store.format.layout import MANIFEST
from ..config import HarvestConfig
from .splits import ALL, DEFAULT, by_name, matching_paths, named_splits, split_files, split_order

PYTHON_STDLIB = "python-stdlib"
_FORMATS = {
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TEXT_FILE, SAVED = "text", "saved"
AMBIGUOUS = {".json", ".csv", ".tsv"}
"""Suffixes of data files that also occur in folders of text, such as a project's package.json."""
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_METADATA = {
    "config.json",
    "croissant.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
    "_common_metadata",
    "_metadata",
    "_success",
}
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct|authors)(?![a-z0-9])",
    re.IGNORECASE,
)
_SPLIT_TEXT = {".txt", ".text", ".raw", ".tokens"}
"""Suffixes of text files whose names may name splits; a file test.py is not a test split."""
CACHE = "__pycache__"
_NOT_STDLIB = {"site-packages", "dist-packages", CACHE}
SNIFFED_BYTES = 8192
FEW_BYTES = 1_000_000
_HEADER = b'{"entry":{"type":"header","format_version":'
"""The first bytes of a store's manifest."""
_BEGUN = (MANIFEST, "harvest.toml")


@dataclass
class FoundFiles:
    """Files in reading order, what they hold, and which were left out and why."""

    root: Path
    format: str
    files: list[Path]
    left_out: list[tuple[str, str]] = field(default_factory=list)


def find_files(config: HarvestConfig) -> FoundFiles | None:
    """Find the files of a configuration; None for a Hugging Face dataset id.

    Raises:
        MissingFileError: nothing is at the path.
        DataError: there is nothing to read, or more than one kind of files and none is chosen.
        ConfigError: a setting does not apply to what is there.
    """
    if config.dataset == PYTHON_STDLIB:
        _refuse(config, dataset_revision="it is this Python's", files="it is read whole")
        root = Path(sysconfig.get_paths()["stdlib"])
        return _text_files(root, _stdlib_files(root), config)
    path = user_path(config.dataset)
    if path.is_dir():
        if is_store(path):
            raise DataError(f"'{config.dataset}' is an activation store; expected the text to make one from")
        _refuse(config, dataset_revision="a local folder has no revisions")
        return _in_folder(path, config)
    if path.is_file():
        _refuse(
            config, dataset_revision="a local file has no revisions", files="it chooses among the files of a folder"
        )
        if format_of(path.name) is None:
            return _text_files(path.parent, [path], config)
        _refuse(config, dataset_config="a file has no configurations")
        splits = by_name([path.name])
        if config.split not in (DEFAULT, ALL, *splits):
            raise ConfigError(f"split is '{config.split}', but '{path}' is read whole; remove split")
        return FoundFiles(path.parent, format_of(path.name) or TEXT_FILE, [path])
    if _looks_like_a_path(config.dataset):
        raise MissingFileError(f"no text at '{config.dataset}'; give a file, a folder, or a Hugging Face dataset id")
    return None


def format_of(name: str) -> str | None:
    """Return the format of a data file by its name; None for other files."""
    return _FORMATS.get(suffix_of(name))


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a file's format, without that of a compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def is_binary(head: bytes) -> bool:
    """Return whether a file that starts with these bytes is not UTF-8 text."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not merely a character that the head cuts
            return True
    return b"\0" in head


def _refuse(config: HarvestConfig, **reasons: str) -> None:
    """Raise `ConfigError` for a setting that would have no effect."""
    for key, reason in reasons.items():
        if getattr(config, key) is not None:
            raise ConfigError(f"{key} does not apply to '{config.dataset}': {reason}; remove it")


def _looks_like_a_path(name: str) -> bool:
    suffix = suffix_of(name)
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or suffix == ".txt" or suffix in _FORMATS


def _stdlib_files(root: Path) -> list[Path]:
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return paths


def _text_files(root: Path, paths: Iterable[Path], config: HarvestConfig) -> FoundFiles:
    """Return text files shuffled by the seed; only those of the split if the names of .txt files name splits."""
    _refuse(config, dataset_config="text files have no configurations")
    if config.text_column != "text":
        raise ConfigError(
            f"text_column is '{config.text_column}', but '{config.dataset}' is read as text files; remove text_column, "
            "or set files to the patterns of data files"
        )
    files = sorted(paths, key=lambda path: _name(path, root))
    random.Random(config.seed).shuffle(files)
    chosen = _text_names(config, [_name(path, root) for path in files])
    return FoundFiles(
        root,
        TEXT_FILE,
        [path for path in files if _name(path, root) in chosen],
        [("of other splits", name) for name in sorted({_name(path, root) for path in files} - chosen)],
    )


def _text_names(config: HarvestConfig, names: list[str]) -> set[str]:
    """Return the text files of the split; all of them if their names do not name splits."""
    splits = named_splits([name for name in names if suffix_of(name) in _SPLIT_TEXT])
    if config.split == ALL or len(names) == 1 or not (len(splits) > 1 or config.split in splits):
        if config.split not in (DEFAULT, ALL, *splits):
            raise ConfigError(f"split is '{config.split}', but '{config.dataset}' is text without splits; remove split")
        return set(names)
    chosen = set(splits.get(config.split, ()))
    if config.split == DEFAULT:
        chosen |= set(names).difference(*splits.values())
    if not chosen:
        raise _no_split(config, splits)
    return chosen


def _no_split(config: HarvestConfig, splits: Iterable[str]) -> DataError:
    there = ", ".join(sorted(splits, key=split_order)) or "none"
    return DataError(f"'{config.dataset}' has no split '{config.split}'; set split to one that it has: {there}")


def _in_folder(folder: Path, config: HarvestConfig) -> FoundFiles:
    """Find the files of a folder: a dataset saved to disk, data files of one format, or text files."""
    saved = _saved(folder, config)
    if saved is not None:
        return saved
    paths, left_out = walk(folder)
    if config.files is not None:
        patterns = [pattern if "/" in pattern else f"**/{pattern}" for pattern in config.files]
        chosen = set(matching_paths([_name(path, folder) for path in paths], patterns))
        left_out.append(("not matched by files", [path for path in paths if _name(path, folder) not in chosen]))
        paths = [path for path in paths if _name(path, folder) in chosen]
        if not paths:
            raise DataError(f"no file in '{folder}' matches files = {config.files}")
    if not paths:
        raise DataError(f"no files in '{folder}'; expected text, JSONL, CSV, Parquet or Arrow files")
    others = [path for path in paths if not format_of(path.name)]
    data = [path for path in paths if format_of(path.name) and path.name.lower() not in _METADATA]
    if not data and not others:
        data = paths
    if _reads_text(folder, data, others, config):
        cached = {path for path in others if CACHE in path.relative_to(folder).parts}
        left_out += [("data files among text", sorted({*paths} - {*others})), ("cache files", sorted(cached))]
        found = _text_files(folder, others, config)
        found.files = [path for path in found.files if path not in cached]
    else:
        left_out.append(("not data", sorted({*paths} - {*data})))
        found = _data_files(folder, data, config)
    found.left_out = [(reason, _name(path, folder)) for reason, whose in left_out for path in whose] + found.left_out
    return found


def _reads_text(folder: Path, data: list[Path], others: list[Path], config: HarvestConfig) -> bool:
    """Return whether to read a folder as text files rather than data files; raise `DataError` if it is ambiguous.

    The other kind may be left out only where it is clearly beside the point: .json, .csv or .tsv files that are fewer
    than the text files, and smaller or less than a megabyte; or text files of a tenth the number and size of the data.
    """
    if not data:
        return True
    text = [path for path in others if not _is_incidental(path.relative_to(folder)) and not _is_binary_file(path)]
    if not text:
        return False
    if config.files is None:
        n_text, n_data = _n_bytes(text), _n_bytes(data)
        if (
            {suffix_of(path.name) for path in data} <= AMBIGUOUS
            and len(data) < len(text)
            and n_data <= max(n_text, FEW_BYTES)
        ):
            return True
        if 10 * len(text) <= len(data) and 10 * n_text <= n_data:
            return False
    raise DataError(
        f"'{folder}' holds data files ({_kinds(data)}) and text files ({_kinds(text)}); set files to the patterns of "
        f'those to read, such as files = ["*{_commonest(data)}"] or files = ["*{_commonest(text)}"]'
    )


def _data_files(folder: Path, paths: list[Path], config: HarvestConfig) -> FoundFiles:
    """Return the data files of the split."""
    names = {_name(path, folder): path for path in paths}
    splits = split_files(folder, list(names), config.dataset_config)
    splits.setdefault(ALL, list({name: None for found in splits.values() for name in found}))
    if not splits.get(config.split):
        raise _no_split(config, [split for split, found in splits.items() if found and split != ALL])
    chosen = {names[name] for name in splits[config.split]}
    files = sorted(chosen)
    formats = sorted({format_of(path.name) or TEXT_FILE for path in files})
    if len(formats) > 1:
        raise DataError(
            f"'{folder}' mixes {' and '.join(formats)} files ({_kinds(files)}); set files to the patterns of those to "
            f'read, such as files = ["*{_commonest(files)}"]'
        )
    left_out = [("of other splits", name) for name, path in names.items() if path not in chosen]
    return FoundFiles(folder, formats[0], files, left_out)


def _saved(folder: Path, config: HarvestConfig) -> FoundFiles | None:
    """Return the files of a dataset that `datasets` saved to disk, or of one split of it; None for other folders."""
    splits = _read_json(folder / "dataset_dict.json").get("splits")
    state = _read_json(folder / "state.json")
    if not isinstance(splits, list) and "_data_files" not in state:
        return None
    _refuse(config, dataset_config="a saved dataset has no configurations", files="a saved dataset is read whole")
    if isinstance(splits, list):
        if config.split not in splits:
            raise _no_split(config, map(str, splits))
        folder = folder / config.split
    elif config.split not in (DEFAULT, ALL, state.get("_split")):
        raise ConfigError(f"split is '{config.split}', but '{folder}' is read whole; remove split")
    return FoundFiles(folder, SAVED, walk(folder)[0])


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def walk(folder: Path) -> tuple[list[Path], list[tuple[str, list[Path]]]]:
    """Return the files below a folder, sorted, and which are left out and why.

    Links to folders are followed, but no folder is read twice.
    """
    files: list[Path] = []
    hidden: list[Path] = []
    stores: list[Path] = []
    broken: list[Path] = []
    repeated: list[Path] = []
    links: list[Path] = []
    seen = {_identity(folder)}

    def visit(top: Path) -> None:
        for parent, subfolders, names in os.walk(top, onerror=_unreadable):
            here = [Path(parent, name) for name in sorted(subfolders)]
            hidden.extend(path for path in here if path.name.startswith("."))
            here = [path for path in here if not path.name.startswith(".")]
            stores.extend(path for path in here if is_store(path))
            here = [path for path in here if path not in stores]
            links.extend(path for path in here if path.is_symlink())
            here = [path for path in here if not path.is_symlink() and _identity(path) not in seen]
            seen.update(map(_identity, here))
            subfolders[:] = [path.name for path in here]
            for path in map(Path(parent).joinpath, names):
                where = hidden if path.name.startswith(".") else files if path.is_file() else broken
                where.append(path)

    visit(folder)
    while links:
        link = links.pop(0)
        if _identity(link) in seen or folder.resolve().is_relative_to(link.resolve()):
            repeated.append(link)
        else:
            seen.add(_identity(link))
            visit(link)
    left_out = [
        ("hidden", hidden),
        ("activation stores", stores),
        ("broken links or devices", broken),
        ("links to folders read elsewhere", repeated),
    ]
    return sorted(files), [(reason, sorted(paths)) for reason, paths in left_out]


def is_store(folder: Path) -> bool:
    """Return whether a folder is an activation store, even an unfinished one; its text files are not documents."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            head = file.read(len(_HEADER))
        # The manifest is empty until the first shard is stored.
        return head == _HEADER or (not head and all(path.is_dir() or path.name in _BEGUN for path in folder.iterdir()))
    except OSError:
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read the folder '{error.filename}': {error.strerror}") from None


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _is_incidental(path: Path) -> bool:
    """Return whether a file only documents a dataset, or is a cache."""
    return bool(_DOCUMENTATION.match(path.name)) or path.name.lower() in _METADATA or CACHE in path.parts


def _is_binary_file(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_binary(file.read(SNIFFED_BYTES))
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from None


def _n_bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _suffixes(paths: list[Path]) -> list[tuple[str, int]]:
    return Counter("".join(path.suffixes[-1:]) for path in paths).most_common()


def _kinds(paths: list[Path]) -> str:
    return ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in _suffixes(paths)[:4])


def _commonest(paths: list[Path]) -> str:
    return _suffixes(paths)[0][0]
