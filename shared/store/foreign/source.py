"""What the importer asks of a format: its shape, and rows of its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...core.errors import StoreError, ThresherError, one_line

_SAMPLE_BYTES = 4096
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Rows(NamedTuple):
    """Consecutive rows: the activations of each hook point, and where the source has them, tokens and a mask."""

    activations: dict[str, Float[Tensor, "n d_in"]]
    tokens: Int[np.ndarray, " n"] | None = None
    usable: Bool[np.ndarray, " n"] | None = None
    """False for rows that the source itself leaves out of training, such as padding."""


@dataclass(frozen=True)
class Shape:
    """What a source holds.

    `part_rows` are the numbers of rows of its parts, in order, and `part_names` their names. With a `context_size`,
    rows `[i * context_size, (i + 1) * context_size)` are context `i`. Without one, the rows have no order; or, with
    `documents`, each part is one document of any length.
    """

    hook_points: dict[str, int]
    dtype: str
    part_names: list[str]
    part_rows: list[int]
    context_size: int | None = None
    documents: bool = False
    one_document_each: bool = False
    """Whether each context is a document of its own, such as an image."""
    has_tokens: bool = False
    has_mask: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Source(Protocol):
    """Activations in another program's files."""

    shape: Shape

    def read(self, part: int, start: int, stop: int) -> Rows:
        """Return rows [start, stop) of a part."""
        ...

    def document(self, part: int) -> Int[np.ndarray, " n"]:
        """Return the tokens of a part that is one document."""
        ...


@dataclass(frozen=True)
class Options:
    """What the user says about a source: hook points to import, and what its files do not tell."""

    hook_points: list[str] | None = None
    layers: list[int] | None = None
    aligned: bool = False


class Format(NamedTuple):
    """A format: its name, whether a path holds it, and how to open it."""

    name: str
    is_in: Callable[[Path], bool]
    open: Callable[[Path, Options], Source]


def dtype_name(dtypes: Sequence[torch.dtype], where: object) -> str:
    """Return the name of the data type that holds tensors of all these types exactly."""
    for dtype in dtypes:
        if dtype not in _DTYPES:
            name = str(dtype).removeprefix("torch.")
            raise StoreError(f"'{where}' holds activations in {name}; expected float32, float16 or bfloat16")
    kinds = {_DTYPES[dtype] for dtype in dtypes}
    return kinds.pop() if len(kinds) == 1 else "float32"


def chosen(found: Sequence[str], wanted: Sequence[str] | None, where: object) -> list[str]:
    """Return the hook points to import, all by default; raise `StoreError` for one that the source does not have."""
    for name in wanted or ():
        if name not in found:
            raise StoreError(f"'{where}' has no hook point '{name}'; it has {', '.join(found)}")
    return [name for name in found if wanted is None or name in wanted]


def shared_value(what: str, values: Sequence[Any], names: Sequence[object]) -> Any:
    """Return the value that all files share; raise `StoreError` naming the first that differs."""
    for value, name in zip(values, names, strict=True):
        if value != values[0]:
            raise StoreError(f"'{name}' has {what} {value}, but '{names[0]}' has {values[0]}; import them separately")
    return values[0]


def digest(files: Sequence[Path], root: Path) -> str:
    """Return a digest of files' names and sizes, and of their first and last bytes."""
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            total.update(file.read(_SAMPLE_BYTES))
    return total.hexdigest()


@contextmanager
def reading_foreign(path: object) -> Iterator[None]:
    """Turn a library's error on a damaged or unexpected file into a `StoreError` of one line."""
    try:
        yield
    except ThresherError:
        raise
    except Exception as error:  # libraries raise many kinds for files that they do not expect
        raise StoreError(f"cannot read '{path}': {one_line(error)}; the file may be damaged or cut short") from error
