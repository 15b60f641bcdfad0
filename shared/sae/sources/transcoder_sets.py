"""circuit-tracer's sets whose `config.yaml` lists the addresses of their parts, `transcoders: [hf://…]`."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from ...core.disk import write_file
from ...core.errors import HubError, SaeError
from ...hub.address import HubAddress, parse_address
from ..formats import find_saes
from ..formats.published.circuit_tracer import CONFIG_NAME
from ..formats.reading import read_yaml

_PARTS = "transcoders"
_URI = re.compile(r"(hf://[^?]+)(?:\?revision=([^&]+))?")


def parts_of(folder: Path) -> list[HubAddress]:
    """Return the parts that a folder's configuration lists; none if it has SAEs itself, or lists nothing.

    Raises:
        SaeError: a part is not on the Hub.
    """
    path = folder / CONFIG_NAME
    if not path.is_file() or find_saes(folder):
        return []
    listed = read_yaml(path, f"the set at '{folder}'").get(_PARTS)
    return [_part(uri, folder) for uri in listed] if isinstance(listed, list) else []


def _part(uri: object, folder: Path) -> HubAddress:
    found = _URI.fullmatch(str(uri))
    try:
        address = parse_address(found[1]) if found else None
    except HubError:
        address = None
    if found is None or address is None or not address.path:
        raise SaeError(f"the set at '{folder}' lists '{uri}', expected hf://USER/REPO/FILE?revision=REVISION")
    return address._replace(revision=found[2] or address.revision)


def assemble(folder: Path, parts: list[HubAddress], download: Callable[[HubAddress], Path]) -> Path:
    """Return a folder in the Hub's cache with links to the downloaded parts of a set.

    Files named `params…`, which are Gemma Scope's, keep the path in their repository, which says what they are of.
    Others become the set's `layer_N.safetensors`.

    Raises:
        HubError: the Hub does not give a part.
    """
    from huggingface_hub import cached_assets_path, constants

    files = [download(part) for part in parts]
    content = (folder / CONFIG_NAME).read_bytes() + "\n".join(map(str, files)).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    root = cached_assets_path("thresher", "transcoder-sets", digest, assets_dir=constants.HF_ASSETS_CACHE)
    config = read_yaml(folder / CONFIG_NAME, f"the set at '{folder}'")
    layers = False
    for number, (part, file) in enumerate(zip(parts, files, strict=True)):
        if file.name.startswith("params"):
            place = root / part.repository.rpartition("/")[2] / Path(part.path).parent
            for beside in (file, *file.parent.glob("*.json")):
                _link(beside, place / beside.name)
        else:
            layers = True
            _link(file, root / f"layer_{number}{file.suffix}")
    if layers:
        own = {key: value for key, value in config.items() if key != _PARTS}
        write_file(root / CONFIG_NAME, yaml.safe_dump(own, sort_keys=False).encode())
    return root


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(file.resolve())
    except OSError:  # a file system without links
        shutil.copyfile(file, target)
