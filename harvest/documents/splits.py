"""Which files of a local dataset belong to which split, by the rules of Hugging Face datasets.

A dataset card (README.md) may name configurations and their files. Otherwise the split is in the name of a folder or
file: train, test, validation or a synonym, alone or beside other words, as in data/train-00000-of-00001.parquet. Files
without such a name are in the split "train".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.utils import glob_translate

from ...shared.core.errors import ConfigError, DataError

DEFAULT, ALL = "train", "all"
SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_KEYWORDS = {word: split for split, words in SYNONYMS.items() for word in words}
_KEYWORD = re.compile(rf"(?<![^-._ 0-9])({'|'.join(_KEYWORDS)})(?![^-._ 0-9])", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_CARD = "README.md"

Splits = dict[str, list[str]]
"""Relative paths by split."""


def split_files(folder: Path, names: Sequence[str], config_name: str | None) -> Splits:
    """Return a folder's data files by split.

    Raises:
        ConfigError: the dataset has several configurations and none is chosen, or not the one that is.
        DataError: the dataset card is damaged.
    """
    configs = _configs(folder)
    if configs:
        return _of_config(_choose_config(folder, configs, config_name), names)
    if config_name is not None:
        splits = _of_config({"data_dir": config_name}, names)
        if not splits:
            raise ConfigError(
                f"'{folder}' has no configuration '{config_name}': no {_CARD} lists it and no sub-folder has that name"
            )
        return splits
    return by_name(names)


def by_name(names: Sequence[str]) -> Splits:
    """Return relative paths by the split in their name; a path that names two splits is in both."""
    splits = named_splits(names)
    named = {name for found in splits.values() for name in found}
    if set(names) - named:
        in_train = named.intersection(splits.get(DEFAULT, ()))
        splits[DEFAULT] = [name for name in names if name in in_train or name not in named]
    return splits


def named_splits(names: Sequence[str]) -> Splits:
    """Return, by split, the relative paths whose names contain one."""
    splits: Splits = {}
    shards = _shard_folders(names)
    for name in names:
        for split in _named(name, shards):
            splits.setdefault(split, []).append(name)
    return splits


def split_order(split: str) -> tuple[int, str]:
    """Return the sort key of a split: train, validation, test, then others by name."""
    known = list(SYNONYMS)
    return (known.index(split) if split in known else len(known), split)


def _named(name: str, shard_folders: set[PurePosixPath]) -> list[str]:
    path = PurePosixPath(name)
    shard = _SHARD.match(path.name)
    if shard and path.parent in shard_folders and shard[1].lower() not in _KEYWORDS:
        return [shard[1]]
    for part in [*reversed(path.parent.parts), path.name]:  # folders before the file, as in datasets
        found = [_KEYWORDS[word.lower()] for word in _KEYWORD.findall(part)]
        if found:
            return list(dict.fromkeys(found))
    return []


def _shard_folders(names: Sequence[str]) -> set[PurePosixPath]:
    """Return the folders with files called SPLIT-00000-of-00001, where any word is a split."""
    folders = set()
    for path in map(PurePosixPath, names):
        shard = _SHARD.match(path.name)
        if shard and shard[1].lower() in _KEYWORDS:
            folders.add(path.parent)
    return folders


def matching_paths(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the relative paths that match a glob pattern, or are in a folder that does.

    Raises `ConfigError` for a malformed pattern.
    """
    regexes = []
    for pattern in patterns:
        pattern = pattern.removeprefix("./").rstrip("/")
        try:
            regexes += [re.compile(glob_translate(glob)) for glob in (pattern, f"{pattern}/**")]
        except (ValueError, re.error) as error:
            raise ConfigError(f"'{pattern}' is not a valid file pattern: {error}") from None
    return [name for name in names if any(regex.match(name) for regex in regexes)]


def _configs(folder: Path) -> list[dict[str, Any]]:
    """Return the configurations that a dataset card lists in its YAML header."""
    card = folder / _CARD
    if not card.is_file():
        return []
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return []
    import yaml

    try:
        header = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the header of '{card}' is not valid YAML: {reason}; repair or remove it") from None
    configs = header.get("configs") if isinstance(header, dict) else None
    if not configs:
        return []
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise DataError(f"the header of '{card}' has no list of configurations under 'configs'; repair or remove it")
    return [config for config in configs if "data_files" in config or "data_dir" in config]


def _choose_config(folder: Path, configs: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    if name is None:
        defaults = [config for config in configs if config.get("default")]
        chosen = defaults[0] if defaults else by_name.get("default")
        if chosen is None and len(configs) == 1:
            chosen = configs[0]
        if chosen is None:
            raise ConfigError(f"'{folder}' has the configurations {', '.join(by_name)}; set dataset_config to one")
        return chosen
    if name not in by_name:
        raise ConfigError(f"'{folder}' has no configuration '{name}'; its {_CARD} lists {', '.join(by_name)}")
    return by_name[name]


def _of_config(config: dict[str, Any], names: Sequence[str]) -> Splits:
    """Return the files of a dataset card's configuration by split."""
    base = str(config.get("data_dir") or "").removeprefix("./").strip("/")
    prefix = f"{base}/" if base else ""
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    patterns = config.get("data_files")
    if patterns is None:
        splits = by_name(below)
    else:
        if isinstance(patterns, dict):
            patterns = [{"split": split, "path": path} for split, path in patterns.items()]
        elif isinstance(patterns, str) or not all(isinstance(entry, dict) for entry in patterns):
            patterns = [{"split": DEFAULT, "path": patterns}]
        splits = {str(entry["split"]): matching_paths(below, _as_list(entry["path"])) for entry in patterns}
    return {split: [prefix + name for name in found] for split, found in splits.items()}


def _as_list(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else [str(pattern) for pattern in patterns]
