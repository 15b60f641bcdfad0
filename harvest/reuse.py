"""Decide whether an existing store can be reused or resumed by a harvest.

Settings are compared by value; text, tokenizer and weights by content, so that paths may be spelled differently.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..shared.core.errors import DataError, MissingFileError, StoreError
from ..shared.core.location import StoreUrl
from ..shared.model.content import describe_files, model_content
from ..shared.model.hook_points import block_and_kind, unique_canonical
from ..shared.model.loading.adapters import model_parts
from ..shared.store.format.layout import Header
from ..shared.store.format.manifest import Manifest
from ..shared.store.read.open import find_manifest as find_manifest
from .config import HarvestConfig
from .documents.documents import PYTHON_STDLIB, hub_fingerprint, source_files
from .tokens.chat import template_source

NOT_RECORDED = (
    "store",
    "cache",
    "device",
    "device_map",
    "max_memory",
    "offload_folder",
    "streaming",
    "threads",
    "workers",
    "on_bad_document",
)
"""Settings that are not recorded."""
LATER = ("special_tokens", "holdout", "trust_remote_code", "tensor_parallel", "engine")
"""Settings that are recorded only if they differ from the default."""
NEUTRAL = ("batch_size", "tensor_parallel", "tokens")
"""Settings that are recorded but not compared: they affect only rounding, or the number of rows."""
_CONTENT = {
    "text": ("dataset", "dataset_revision"),
    "weights": ("model", "revision"),
    "tokenizer": (),
    "adapter": ("adapter",),
}
"""Each kind of content and the settings that name it, which are compared only if the content is unknown."""
SPELLING = {"model", "adapter", "dataset", "tokenizer", "tokenizer_files", "tokenizer_digest", "harvest"}
"""Metadata keys that `compare` already checks, or that differ between versions, as saved tokenizers do."""
SAMPLES = 64
SAMPLE_BYTES = 4096


def identity(config: HarvestConfig) -> dict[str, Any]:
    """Return what determines a store's rows: the settings, and digests of text, weights and tokenizer."""
    keys: dict[str, Any] = {
        key: value
        for key, value in msgspec.to_builtins(config).items()
        if key not in NOT_RECORDED and value is not None
    }
    defaults = _defaults()
    for key in LATER:
        if keys.get(key) == defaults[key]:
            del keys[key]  # as in stores older than the setting
    if config.chat_template is not None:
        keys["chat_template"] = template_source(config.chat_template)
    keys["hook_points"] = unique_canonical(config.hook_points)
    return keys | {"content": {"text": text_content(config), **weights_content(config)}}


def weights_content(config: HarvestConfig) -> dict[str, str | None]:
    """Return what identifies the weights, the tokenizer and, if there is one, the adapter."""
    parts = model_parts(config.model, config.adapter)
    if parts.adapter is None:
        return model_content(config.model, config.revision, config.cache)
    adapter = model_content(parts.adapter, cache=config.cache)
    if parts.adapter == parts.base:
        return adapter | {"adapter": adapter["weights"]}
    base = model_content(parts.base, config.revision or parts.base_revision, config.cache)
    tokenizers = [base["tokenizer"]] if config.adapter else [adapter["tokenizer"], base["tokenizer"]]
    return {
        "weights": base["weights"],
        "tokenizer": " and ".join(filter(None, tokenizers)) or None,
        "adapter": adapter["weights"],
    }


def text_content(config: HarvestConfig) -> str | None:
    """Return what identifies the text: a digest of local files, or the dataset's revision; None if unavailable."""
    try:
        paths = source_files(config)
        if paths is None:
            return f"revision {hub_fingerprint(config)}"
        root = Path(config.dataset).expanduser()
        if config.dataset == PYTHON_STDLIB:
            root = Path(sysconfig.get_paths()["stdlib"])
        root = root if root.is_dir() else root.parent
        return describe_files({path.relative_to(root).as_posix(): path for path in paths}, config.cache)
    except (DataError, MissingFileError):
        return None  # a complete store needs no text; a harvest reports what is missing


def check_unchanged(config: HarvestConfig, wanted: dict[str, Any]) -> None:
    """Raise `DataError` if local text has changed since its identity was computed."""
    was = wanted["content"]["text"]
    if was is not None and not was.startswith("revision ") and (now := text_content(config)) != was:
        raise DataError(
            f"the text of '{config.dataset}' changed while it was harvested ({was}, now {now}): the store "
            f"'{config.store}' may mix both and is left unfinished; harvest into another store"
        )


class StoreStatus(NamedTuple):
    """Whether a store already holds all rows of a harvest, and notes for the user."""

    complete: bool
    notes: tuple[str, ...] = ()


def is_complete(store: Path | StoreUrl, wanted: dict[str, Any]) -> bool:
    """Return whether the store exists, is complete, and has this identity; raise as `compare` does."""
    return compare_store(store, wanted).complete


def compare_store(store: Path | StoreUrl, wanted: dict[str, Any]) -> StoreStatus:
    """Compare an existing store with the identity of a harvest.

    Raises `StoreError` if the store is from a different harvest, with the differences.
    """
    manifest = find_manifest(store)
    if manifest is None:
        return StoreStatus(complete=False)
    found = manifest.header.metadata.get("harvest")
    if not isinstance(found, dict):
        raise StoreError(f"the store '{store}' was not written by a harvest; name another store")
    differences = _differing_settings(found, wanted, manifest.header.metadata) | _differing_content(found, wanted)
    if differences:
        listed = ", ".join(f"{key} ({was!r}, now {now!r})" for key, (was, now) in sorted(differences.items()))
        raise StoreError(f"the store '{store}' is of another harvest: it differs in {listed}; {_advice(differences)}")
    complete, size_notes = _compare_size(store, manifest, wanted)
    notes = _notes(found, wanted) + _unmeasured(manifest.header) + size_notes
    for key in ("batch_size", "tensor_parallel"):
        was, now = found.get(key, _defaults()[key]), wanted.get(key, _defaults()[key])
        if not complete and was != now:
            notes.append(
                f"resumes a store of {key} {was} with {key} {now}: its rows equal those of a single {key} up to "
                "rounding, not bit for bit"
            )
    return StoreStatus(complete, tuple(notes))


def _compare_size(store: Path | StoreUrl, manifest: Manifest, wanted: dict[str, Any]) -> tuple[bool, list[str]]:
    """Return whether a store of the same harvest has all rows, and notes.

    Raises `StoreError` if the store is unfinished and holds more rows than `tokens`.
    """
    size, header = wanted["context_size"], manifest.header
    n_wanted, n_stored = -(-wanted["tokens"] // size), manifest.n_contexts
    n_declared = n_stored if header.n_contexts is None else header.n_contexts
    holds = f"holds {n_stored * size:,} rows"
    if manifest.completion is None:
        if n_wanted < n_stored:
            raise StoreError(
                f"the store '{store}' is not finished and already {holds}, more than the {wanted['tokens']:,} "
                f"requested; request at least as many (tokens = {n_declared * size} finishes it), or name another store"
            )
        resumed = f"the store {holds} and was started for {n_declared * size:,}; it will now hold {n_wanted * size:,}"
        return False, [resumed] if n_wanted != n_declared else []
    if n_wanted < n_stored:
        return True, [f"the store {holds}, more than the {wanted['tokens']:,} requested"]
    if n_wanted in (n_stored, n_declared):
        return True, []
    if n_stored < n_declared:
        return True, [f"the store {holds}, all that the text yields; {wanted['tokens']:,} were requested"]
    return False, [f"the store {holds} and is extended to {n_wanted * size:,}"]


def _differing_settings(
    found: dict[str, Any], wanted: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, with both values; a setting that is not recorded had its default."""
    named = {name for names in _CONTENT.values() for name in names}
    ignored = {*NOT_RECORDED, *NEUTRAL, *named, "content", "weights"}
    defaults = _defaults()
    differing = {}
    for key in (found.keys() | wanted.keys()) - ignored:
        was, now = (record.get(key, defaults.get(key)) for record in (found, wanted))
        if key == "hook_points":
            was, now = sorted(was or []), sorted(now or [])
        if key == "model_dtype" and was == "auto" and now == metadata.get("model_dtype"):
            continue
        if was != now:
            differing[key] = (was, now)
    return differing


def _defaults() -> dict[str, Any]:
    fields = msgspec.structs.fields(HarvestConfig)
    return {field.name: None if field.default is msgspec.NODEFAULT else field.default for field in fields}


def _differing_content(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences in text, weights and tokenizer: in content or, if that is unknown, in names."""
    differing = {}
    for what, names in _CONTENT.items():
        was, now = _content(found, what), _content(wanted, what)
        if was is not None and now is not None:
            if was != now:
                differing[what] = (was, now)
            continue
        for name in names:
            if not _is_same_name(found.get(name), wanted.get(name)):
                differing[name] = (found.get(name), wanted.get(name))
    samples = found.get("weights")
    if samples is not None and (now := sampled_fingerprint(Path(wanted["model"]).expanduser())) not in (None, samples):
        differing["weights"] = (samples, now)
    return differing


def _content(record: dict[str, Any], what: str) -> str | None:
    content = record.get("content")
    return content.get(what) if isinstance(content, dict) else None


def _is_same_name(first: Any, second: Any) -> bool:
    if first == second:
        return True
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    paths = [os.path.abspath(os.path.expanduser(name)) for name in (first, second)]
    return paths[0] == paths[1] and os.path.exists(paths[0])


def _advice(differing: dict[str, tuple[Any, Any]]) -> str:
    commits = [was for what, (was, _) in differing.items() if what != "text" and str(was).startswith("commit ")]
    if commits and set(differing) <= {"weights", "tokenizer"}:
        return f"name another store, or use the model's earlier commit: revision = {commits[0].split()[1]!r}"
    return "name another store"


def resumed_metadata(store: Path | StoreUrl, header: Header, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a store to resume: its existing metadata, with the new number of tokens.

    Raises `StoreError` for a difference other than the spelling of names or the number of rows.
    """
    found = header.metadata
    for key in sorted(found.keys() & metadata.keys() - SPELLING):
        was, now = found[key], metadata[key]
        if key == "certificate":  # what is measured in differs if the model is spread or divided
            was, now = was.get("hook_points"), now.get("hook_points")
        if was != now:
            raise StoreError(
                f"the store '{store}' was started with {key} = {found[key]!r}, now {metadata[key]!r}; "
                "use the same settings and versions, or name another store"
            )
    if "certificate" not in found:
        for name, point in metadata["certificate"]["hook_points"].items():
            if point["derived"] or point["cloned"]:
                now = f"taken as {point['derived']}" if point["derived"] else "copied before the model writes into it"
                raise StoreError(
                    f"the store '{store}' was written by a version of Thresher that took '{name}' from "
                    f"{point['module']} unchanged; it is now {now}, and the store would mix both: name another store"
                )
    wanted = metadata["harvest"]
    if header.n_contexts == -(-wanted["tokens"] // wanted["context_size"]):
        return found
    return found | {"harvest": found["harvest"] | {"tokens": wanted["tokens"]}}


def _notes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return notes on what could not be compared."""
    if "content" not in found:
        return [
            "the store was written by a version of Thresher that did not record the content of text, tokenizer and "
            "weights: only names and settings were compared"
        ]
    recorded = found["content"].keys() | wanted["content"].keys()
    unknown = [
        what for what in _CONTENT if what in recorded and None in (_content(found, what), _content(wanted, what))
    ]
    if not unknown:
        return []
    return [f"the content of {' and '.join(unknown)} is unknown here: names and settings were compared instead"]


def _unmeasured(header: Header) -> list[str]:
    """Return a note on a store that was written before hook points were measured."""
    kinds = {found[1] for found in map(block_and_kind, header.hook_points) if found is not None}
    if "certificate" in header.metadata or kinds <= {"resid_pre", "resid_post"}:
        return []
    return [
        "the store was written by a version of Thresher that did not measure hook points: in models such as BLOOM, "
        "MPT, Granite and Falcon, its attn_out and mlp_out are not what these names now mean; "
        "harvest such a model again"
    ]


def sampled_fingerprint(model: Path) -> str | None:
    """Return the hash over a model folder's weight files (name, size, samples) that older stores record."""
    if not model.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin"), model / "config.json"]):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
