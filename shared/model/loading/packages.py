"""Models that come with Python packages: Thresher's own, and GGUF files in others.

`model` may be `stdlib-lm`, the bundled model, or `package:NAME` for an installed package with a GGUF file. A package
may hold the file in parts, itself or in the packages that it requires; they are then joined, once, in the user's cache.
Needs no PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path

from ...core.errors import ModelError
from ...core.location import cache_folder
from ...core.paths import expand_home

BUNDLED = "stdlib-lm"
"""The name of the model that comes with Thresher; a folder of this name in the working directory is taken instead."""
PACKAGE = "package:"
_WHOLE = re.compile(r"\.gguf$")
_PART = re.compile(r"^(?P<whole>.+\.gguf)\.part\d+$")
_BLOCK_BYTES = 1 << 22


def local_model(model: str) -> str:
    """Return where a model is: the bundled model's folder, a `package:NAME`'s GGUF file, or the name with `~` expanded.

    Raises:
        ModelError: the package is not installed, or it holds no GGUF file, several, or a damaged one.
    """
    if model == BUNDLED and not Path(model).exists():
        return str(files("thresher.models") / BUNDLED)
    if not model.startswith(PACKAGE):
        return expand_home(model)
    name = model.removeprefix(PACKAGE)
    try:
        package = distribution(name)
    except (PackageNotFoundError, ValueError):
        raise ModelError(f"no package '{name}' is installed here for model = '{model}'; pip install {name}") from None
    found = _files_of(package)
    whole = [path for path in found if _WHOLE.search(path.name)]
    if len(whole) == 1:
        return str(whole[0])
    parts = [path for path in found if _PART.search(path.name)]
    names = {match["whole"] for match in map(_PART.search, (path.name for path in parts)) if match}
    if whole or len(names) != 1:
        listed = ", ".join(sorted({path.name for path in whole} | names)) or "none"
        raise ModelError(f"expected one GGUF file in package '{name}', found: {listed}; give the path of one as model")
    return str(_joined(sorted(parts, key=lambda path: path.name), names.pop(), _checksum(found)))


def _files_of(package: Distribution) -> list[Path]:
    """Return the files of a package, and of the packages that it requires, that are there."""
    packages = [package]
    for requirement in package.requires or []:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match is None or "extra ==" in requirement:
            continue
        with suppress(PackageNotFoundError):  # what runs the model in another way may well be missing
            packages.append(distribution(match[0]))
    files = [Path(str(each.locate_file(file))) for each in packages for file in each.files or []]
    return [path for path in files if path.is_file()]


def _checksum(files: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by name, as a package's `SHA256SUMS` lists them."""
    lines = [line.split() for path in files if path.name == "SHA256SUMS" for line in path.read_text().splitlines()]
    return {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}


def _joined(parts: list[Path], name: str, checksums: dict[str, str]) -> Path:
    """Return the file that parts make, in the cache; it is complete when it has its name."""
    n_bytes = sum(path.stat().st_size for path in parts)
    folder = cache_folder() / "models" / hashlib.blake2b(os.fsencode(parts[0].resolve()), digest_size=8).hexdigest()
    whole = folder / name
    if whole.is_file() and whole.stat().st_size == n_bytes:
        return whole
    folder.mkdir(parents=True, exist_ok=True)
    partial = whole.with_name(f"{name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as out:
            for path in parts:
                with path.open("rb") as part:
                    while block := part.read(_BLOCK_BYTES):
                        digest.update(block)
                        out.write(block)
        if checksums.get(name, digest.hexdigest()) != digest.hexdigest():
            raise ModelError(f"the parts of '{name}' do not match their checksum; install the package again")
        os.replace(partial, whole)
    finally:
        partial.unlink(missing_ok=True)
    return whole
