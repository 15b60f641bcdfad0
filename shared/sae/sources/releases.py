"""Short names of published SAEs, from the registry file of SAELens where that is installed; it is not imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...core.errors import SaeError
from ...hub.address import HubAddress

_REGISTRY = "pretrained_saes.yaml"


class Release(NamedTuple):
    """Where an SAE of a release is, and what the registry says about it: `stated` changes how its files are read."""

    address: HubAddress
    metadata: dict[str, Any]
    stated: dict[str, Any]


def registry_file() -> Path | None:
    """Return SAELens's registry file, or None where SAELens is not installed."""
    try:
        spec = find_spec("sae_lens")
    except (ImportError, ValueError):
        return None
    path = Path(spec.origin).parent / _REGISTRY if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def find_release(name: str) -> Release | None:
    """Return the SAE with a name such as `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`.

    None if there is no registry, or no release of that name in it. An id of the release `NAME-canonical` may be given
    as one of `NAME`.

    Raises:
        SaeError: the release has no such SAE.
    """
    release, _, identity = name.partition("/")
    file = registry_file()
    if file is None or not release or not identity:
        return None
    found, ids = False, []
    for key in (release, f"{release}-canonical"):
        entry = _entry(file, key)
        if entry is None:
            continue
        found = True
        for sae in entry.get("saes") or []:
            ids.append(str(sae.get("id")))
            if ids[-1] == identity:
                address = HubAddress(str(entry["repo_id"]), str(sae["path"]))
                return Release(address, _metadata(entry, sae), _stated(entry, sae))
    if not found:
        return None
    raise SaeError(f"the release '{release}' has no SAE '{identity}'; expected one of {len(ids)}, such as {ids[0]}")


def _entry(file: Path, release: str) -> dict[str, Any] | None:
    """Return a release's part of the registry, which alone is parsed: the whole takes seconds."""
    lines: list[str] = []
    with file.open(encoding="utf-8") as content:
        for line in content:
            if lines and not line.startswith((" ", "-", "\n", "#")):
                break
            if lines or line.rstrip() == f"{release}:":
                lines.append(line)
    if not lines:
        return None
    return yaml.safe_load("".join(lines))[release]


def _stated(entry: dict[str, Any], sae: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the registry adds to those of the files."""
    stated = {"normalize_activations": (entry.get("config_overrides") or {}).get("normalize_activations")}
    stated["norm_scaling_factor"] = sae.get("norm_scaling_factor")
    return {key: value for key, value in stated.items() if value is not None}


def _metadata(entry: dict[str, Any], sae: dict[str, Any]) -> dict[str, Any]:
    published = {
        ours: sae[theirs]
        for ours, theirs in (("l0", "l0"), ("explained_variance", "variance_explained"))
        if isinstance(sae.get(theirs), int | float)
    }
    metadata: dict[str, Any] = {"model_name": entry["model"]} if entry.get("model") else {}
    metadata |= {"neuronpedia_id": sae["neuronpedia"]} if sae.get("neuronpedia") else {}
    processing = (entry.get("config_overrides") or {}).get("model_from_pretrained_kwargs")
    metadata |= {"model_from_pretrained_kwargs": processing} if processing else {}
    return metadata | ({"published": published} if published else {})
