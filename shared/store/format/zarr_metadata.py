"""The `zarr.json` documents of a store, as the Zarr v3 specification defines them."""

from __future__ import annotations

from typing import Any

import msgspec

from .layout import ITEM_BYTES, ArrayLayout, Header, arrays_of


def array_metadata(array: ArrayLayout, header: Header, n_rows: int) -> dict[str, Any]:
    """Return an array's metadata: shards of chunks, each compressed and checksummed."""
    tail = [] if array.width is None else [array.width]
    compressor = {
        "name": "blosc",
        "configuration": {
            "cname": array.codec,
            "clevel": header.codec_level if array.codec == header.codec else 1,
            "shuffle": shuffle_of(array),
            "typesize": ITEM_BYTES[array.dtype],
            "blocksize": block_bytes_of(array),
        },
    }
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = [{"name": "bytes"} if ITEM_BYTES[array.dtype] == 1 else little_endian]
    if array.codec != "none":
        inner.append(compressor)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_rows, *tail],
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [array.shard_rows, *tail]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0 if array.dtype.startswith("int") else 0.0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [array.chunk_rows, *tail],
                    "codecs": [*inner, {"name": "crc32c"}],
                    "index_codecs": [little_endian, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "dimension_names": ["row"] if array.width is None else ["row", f"d_in_{array.width}"],
    }


def shuffle_of(array: ArrayLayout) -> str:
    """Return blosc's filter: the one that compressed this kind of array best (docs/FORMAT.md)."""
    if array.dtype == "int8":
        return "noshuffle"
    return "shuffle" if array.codec == "zstd" and array.width is not None else "bitshuffle"


def block_bytes_of(array: ArrayLayout) -> int:
    """Return blosc's block size, 0 for its own choice: zstd compresses far better in one block than in several."""
    if array.dtype == "int32":
        return 0
    return array.chunk_bytes if array.codec == "zstd" else 64 << 10


def metadata_files(header: Header, n_rows: int) -> dict[str, bytes]:
    """Return the content of every `zarr.json`, by its path in the store.

    `n_rows` is 0 until the store is complete, so that no Zarr reader mistakes an unfinished store for a complete one.
    """
    arrays = {array.name: array_metadata(array, header, n_rows) for array in arrays_of(header)}
    nodes: dict[str, Any] = dict(arrays)
    if header.codec == "int8":
        nodes["scales"] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"thresher": msgspec.to_builtins(header)},
        # Consolidated, so that Zarr readers find the arrays without listing the store's files.
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes},
    }
    documents = {f"{name}/zarr.json": node for name, node in nodes.items()} | {"zarr.json": group}
    return {path: msgspec.json.format(msgspec.json.encode(node), indent=2) for path, node in documents.items()}
