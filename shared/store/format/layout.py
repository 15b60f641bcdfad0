"""The layout of a store: its arrays and files, and how rows are divided into chunks and shards (docs/FORMAT.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from ...core.errors import ConfigError

FORMAT_VERSION = 1
MANIFEST = "manifest.jsonl"
STATISTICS = "statistics.safetensors"
TOKENS = "tokens"
ROLES = "roles"
TOKENIZER_FOLDER = "tokenizer"
PARTIAL_FOLDER = ".partial"
STAGED_FOLDER = ".staged"
RESERVED_NAMES = {
    TOKENS,
    ROLES,
    TOKENIZER_FOLDER,
    "scales",
    "provenance",
    "statistics",
    "zarr.json",
    MANIFEST,
    STATISTICS,
}
CHUNK_BYTES = 256 << 10
SHARD_BYTES = 256 << 20
MAX_TOKEN_CHUNK_ROWS = 64 << 10
MAX_ROWS = 1 << 48

Dtype = Literal["bfloat16", "float16", "float32"]
Codec = Literal["none", "lz4", "zstd", "int8"]
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "int32": 4}

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_ROWS)]
Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_ROWS)]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class Header(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag="header",
    tag_field="type",
):
    """The first line of the manifest: what a store holds, fixed when it is created.

    `covariance` is true only in stores that an earlier version wrote with covariances: they can be read, not resumed.
    """

    format_version: int
    hook_points: dict[str, Size]
    context_size: Size
    dtype: Dtype
    codec: Codec
    codec_level: Annotated[int, msgspec.Meta(ge=0, le=22)]
    chunk_rows: Size
    shard_rows: Size
    has_tokens: bool
    mask_token_ids: list[int]
    n_contexts: Count | None
    metadata: dict[str, Any]
    covariance: bool = False
    has_roles: bool = False

    @property
    def contexts_per_shard(self) -> int:
        """Contexts in a full shard."""
        return self.shard_rows // self.context_size

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a hook point's array in a full shard."""
        return self.shard_rows // self.chunk_rows


@dataclass(frozen=True)
class ArrayLayout:
    """One Zarr array of a store: `width` is None for one dimension."""

    name: str
    width: int | None
    dtype: str
    codec: str
    chunk_rows: int
    shard_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return (self.width or 1) * ITEM_BYTES[self.dtype]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk before compression."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Chunks in a full shard."""
        return self.shard_rows // self.chunk_rows

    def shard_key(self, shard: int) -> str:
        """Return a shard's file name, relative to the store."""
        return f"{self.name}/c.{shard}" + ("" if self.width is None else ".0")

    def n_chunks(self, rows: int) -> int:
        """Return how many chunks hold `rows` rows."""
        return -(-rows // self.chunk_rows)


def arrays_of(header: Header) -> tuple[ArrayLayout, ...]:
    """Return all Zarr arrays of a store, in the order in which they are written: hook points first."""
    rows = (header.chunk_rows, header.shard_rows)
    arrays = []
    for name, d_in in header.hook_points.items():
        if header.codec == "int8":
            arrays.append(ArrayLayout(name, d_in, "int8", "zstd", *rows))
            arrays.append(ArrayLayout(scales_name(name), None, "float32", "none", *rows))
        else:
            arrays.append(ArrayLayout(name, d_in, header.dtype, header.codec, *rows))
    token_rows = header.chunk_rows * _divisor_below(
        header.chunks_per_shard, max(1, MAX_TOKEN_CHUNK_ROWS // header.chunk_rows)
    )
    if header.has_tokens:
        arrays.append(ArrayLayout(TOKENS, None, "int32", "zstd", token_rows, header.shard_rows))
    if header.has_roles:
        arrays.append(ArrayLayout(ROLES, None, "int8", "zstd", token_rows, header.shard_rows))
    return tuple(arrays)


def scales_name(hook_point: str) -> str:
    """Return the name of the array that holds a hook point's int8 scales."""
    return f"scales/{hook_point}"


def statistics_key(shard: int) -> str:
    """Return the file of a shard's moments and training-row counts."""
    return f"statistics/{shard:05d}.safetensors"


def provenance_key(shard: int) -> str:
    """Return the file of a shard's documents and positions."""
    return f"provenance/{shard:05d}.parquet"


def shard_keys(header: Header, shard: int) -> list[str]:
    """Return the paths of a shard's files within the store."""
    keys = [array.shard_key(shard) for array in arrays_of(header)]
    return [*keys, statistics_key(shard), provenance_key(shard)]


def bytes_per_value(dtype: str, codec: str) -> int:
    """Return the bytes of a stored activation before compression."""
    return ITEM_BYTES["int8" if codec == "int8" else dtype]


def choose_chunk_rows(widest_row_bytes: int, context_size: int, chunk_bytes: int) -> int:
    """Return the rows per chunk: close to `chunk_bytes`, and a multiple or divisor of a context if possible."""
    target = max(1, chunk_bytes // widest_row_bytes)
    if context_size <= target:
        return target // context_size * context_size
    divisor = _divisor_below(context_size, target)
    return divisor if 4 * divisor >= target else 1 << (target.bit_length() - 1)


def choose_shard_rows(chunk_rows: int, context_size: int, widest_row_bytes: int, shard_bytes: int) -> int:
    """Return the rows per shard: the largest multiple of chunk and context within `shard_bytes`, at least one."""
    unit = math.lcm(chunk_rows, context_size)
    return unit * max(1, shard_bytes // (unit * widest_row_bytes))


def _divisor_below(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`."""
    return next(part for part in range(min(number, limit), 0, -1) if number % part == 0)


def make_header(
    hook_points: Mapping[str, int],
    context_size: int,
    *,
    dtype: str,
    codec: str,
    codec_level: int | None,
    mask_token_ids: Sequence[int],
    metadata: Mapping[str, Any],
    n_contexts: int | None,
    has_tokens: bool,
    chunk_bytes: int,
    shard_bytes: int,
    has_roles: bool = False,
) -> Header:
    """Return the header of a new store; raise `ConfigError` for a value that is not acceptable."""
    if not hook_points:
        raise ConfigError("expected at least one hook point to store, got none; name the hook points and their widths")
    for name, d_in in hook_points.items():
        check_hook_point_name(name)
        if d_in < 1:
            raise ConfigError(f"hook point '{name}': expected a width of at least 1, got {d_in}")
    if context_size < 1:
        raise ConfigError(f"expected a context_size of at least 1, got {context_size}")
    for what, value, known in (("dtype", dtype, Dtype), ("codec", codec, Codec)):
        if value not in known.__args__:
            raise ConfigError(f"expected {what} to be one of {', '.join(known.__args__)}; got '{value}'")
    widest = max(hook_points.values()) * bytes_per_value(dtype, codec)
    chunk_rows = choose_chunk_rows(widest, context_size, chunk_bytes)
    level = codec_level if codec_level is not None else {"none": 0, "lz4": 9, "zstd": 1, "int8": 1}[codec]
    return Header(
        format_version=FORMAT_VERSION,
        hook_points=dict(hook_points),
        context_size=context_size,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        codec=codec,  # pyright: ignore[reportArgumentType]
        codec_level=level,
        chunk_rows=chunk_rows,
        shard_rows=choose_shard_rows(chunk_rows, context_size, widest, shard_bytes),
        has_tokens=has_tokens,
        mask_token_ids=sorted({int(token) for token in mask_token_ids}),
        n_contexts=n_contexts,
        metadata=dict(metadata),
        has_roles=bool(has_roles),
    )


def check_hook_point_name(name: str, reserved: Set[str] = RESERVED_NAMES) -> None:
    """Raise `ConfigError` for a name that cannot be an array of the store."""
    if not _NAME.fullmatch(name) or name in reserved or ".." in name:
        raise ConfigError(
            f"hook point '{name}' cannot name an array; expected letters, digits, '.', '_' and '-', "
            f"starting with a letter, digit or '_', and none of {', '.join(sorted(reserved))}"
        )
