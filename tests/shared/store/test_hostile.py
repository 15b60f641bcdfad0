"""Hostile manifests, footers and statistics give an error, and take no more memory than the file's size."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import StoreError
from thresher.shared.store.format.checksum import crc32c
from thresher.shared.store.format.codecs import decode_chunk, encode_chunk
from thresher.shared.store.format.footer import encode_footer, footer_bytes, parse_footer
from thresher.shared.store.format.layout import ArrayLayout, Header, make_header
from thresher.shared.store.format.manifest import Completion, FileRecord, ShardRecord, encode_line, parse_manifest
from thresher.shared.store.format.provenance import decode_segments
from thresher.shared.store.format.statistics import decode_statistics
from thresher.shared.store.local import durable

HEADER = make_header(
    {"a": 4},
    8,
    dtype="bfloat16",
    codec="lz4",
    codec_level=None,
    mask_token_ids=[],
    metadata={},
    n_contexts=None,
    has_tokens=False,
    chunk_bytes=64,
    shard_bytes=640,
)


def lines(*entries: Header | ShardRecord | Completion) -> bytes:
    content, checksum = b"", 0
    for entry in entries:
        line, checksum = encode_line(entry, checksum)
        content += line
    return content


def forged(raw: bytes) -> bytes:
    """Return a line with the right checksum, as an attacker would write it."""
    return b'{"entry":%b,"crc32c":"%08x"}\n' % (raw, crc32c(raw))


def header_with(**changes: object) -> bytes:
    return forged(msgspec.json.encode(msgspec.to_builtins(HEADER) | changes))


GOOD = lines(HEADER, ShardRecord(shard=0, contexts=3, files={"x": FileRecord(1, 2)}))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_as_a_manifest_are_none_or_an_error(content: bytes) -> None:
    for attempt in (content, content + b"\n", forged(content), GOOD + content + b"\n"):
        try:
            found = parse_manifest(attempt)
        except StoreError:
            continue
        assert found is None or found.n_bytes <= len(attempt)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(at: int, bit: int) -> None:
    content = bytearray(GOOD)
    content[at] ^= 1 << bit
    try:
        found = parse_manifest(bytes(content))
    except StoreError:
        return
    assert found is None or len(found.shards) == 0, "only a line whose newline was hit may vanish"
    assert at == len(GOOD) - 1 or not (GOOD[at:].strip(b"\n"))


@pytest.mark.parametrize(
    "changes",
    [
        {"hook_points": {"../../etc/passwd": 4}},
        {"hook_points": {"/absolute": 4}},
        {"hook_points": {"a": 2**60}},
        {"hook_points": {"a": -1}},
        {"hook_points": {}},
        {"chunk_rows": 0},
        {"chunk_rows": 7},
        {"shard_rows": 2**62},
        {"context_size": -8},
        {"format_version": 2},
        {"dtype": "object"},
        {"codec": "pickle"},
        {"codec_level": 99},
        {"surprise": 1},
    ],
)
def test_hostile_headers_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        parse_manifest(header_with(**changes))


def test_deep_json_is_refused() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for raw in (
        deep,
        msgspec.json.encode(msgspec.to_builtins(HEADER)).replace(b'"metadata":{}', b'"metadata":{"x":%b}' % deep),
    ):
        with pytest.raises(StoreError, match="line 1"):
            parse_manifest(forged(raw))


@pytest.mark.parametrize(
    "entries",
    [
        [ShardRecord(shard=0, contexts=3, files={})],
        [HEADER, HEADER],
        [HEADER, ShardRecord(shard=1, contexts=3, files={})],
        [HEADER, ShardRecord(shard=0, contexts=2**40, files={})],
        [HEADER, ShardRecord(shard=0, contexts=3, files={}), ShardRecord(shard=1, contexts=3, files={})],
        [HEADER, Completion(shards=1, contexts=3, files={})],
        [HEADER, Completion(shards=0, contexts=0, files={}), ShardRecord(shard=0, contexts=3, files={})],
    ],
)
def test_lines_out_of_order_are_refused(entries: list) -> None:
    with pytest.raises(StoreError, match=r"line \d"):
        parse_manifest(lines(*entries))


def test_something_after_the_last_line_is_refused() -> None:
    content = lines(HEADER, Completion(shards=0, contexts=0, files={}))
    assert parse_manifest(content) is not None
    for more in (b"x", b"\n", b"{}\n"):
        with pytest.raises(StoreError):
            parse_manifest(content + more)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(5, 90), min_size=1, max_size=6), st.integers(0, 3), st.data())
def test_footers_are_what_was_written_or_an_error(sizes: list[int], missing: int, data: st.DataObject) -> None:
    n_chunks = len(sizes) + missing
    checksums = [size * 7 for size in sizes]
    footer = encode_footer(sizes, checksums, n_chunks)
    file_bytes = sum(sizes) + len(footer)
    bounds, table = parse_footer(footer, n_chunks, len(sizes), file_bytes)
    np.testing.assert_array_equal(bounds, np.cumsum([0, *sizes]))
    np.testing.assert_array_equal(table, checksums)
    # An attacker who mends the index's checksum still cannot name bytes outside the file, or overlapping ones.
    packed = np.frombuffer(footer[4 * n_chunks : -4], dtype="<u8").copy()
    at = data.draw(st.integers(0, packed.size - 1))
    value = data.draw(st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**63, 2**64 - 1, 2**64 - 2]))
    if value == packed[at]:
        return
    packed[at] = value
    evil = footer[: 4 * n_chunks] + packed.tobytes() + crc32c(packed.tobytes()).to_bytes(4, "little")
    with pytest.raises(StoreError):
        parse_footer(evil, n_chunks, len(sizes), file_bytes)


@given(st.binary(max_size=200), st.integers(1, 9), st.integers(0, 9), st.integers(-5, 500))
def test_any_bytes_as_a_footer_are_an_error(content: bytes, n_chunks: int, n_written: int, file_bytes: int) -> None:
    with pytest.raises(StoreError):
        parse_footer(content.ljust(footer_bytes(n_chunks), b"\x01"), n_chunks, n_written, file_bytes)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_side_files_or_chunks_are_an_error(content: bytes) -> None:
    with pytest.raises(StoreError):
        decode_statistics(content, HEADER, 3)
    with pytest.raises(StoreError):
        decode_segments(content)
    array = ArrayLayout("a", 4, "bfloat16", "lz4", 8, 80)
    with pytest.raises(StoreError):
        decode_chunk(array, np.frombuffer(content, dtype=np.uint8), np.empty(64, dtype=np.uint8))


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_an_altered_chunk_decodes_within_its_buffer_or_not_at_all(at: int, value: int) -> None:
    array = ArrayLayout("a", 64, "bfloat16", "lz4", 64, 640)
    rows = np.arange(64 * 64, dtype="<u2").reshape(64, 64) // 50
    stored = np.frombuffer(encode_chunk(array, rows, 5), dtype=np.uint8).copy()
    stored[at % stored.size] = value
    guarded = np.full(array.chunk_bytes + 64, 0xA5, dtype=np.uint8)
    try:
        decode_chunk(array, stored, guarded[: array.chunk_bytes])
    except StoreError:
        pass
    assert (guarded[array.chunk_bytes :] == 0xA5).all()


def test_a_huge_declared_store_costs_no_memory_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "flush", lambda handle: None)
    with ActivationStoreWriter(tmp_path / "s", {"a": 4}, 8, chunk_bytes=64, shard_bytes=640) as writer:
        writer.append({"a": torch.zeros(3, 8, 4)})
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    good = parse_manifest((tmp_path / "s" / "manifest.jsonl").read_bytes())
    assert good is not None
    huge = msgspec.structs.replace(good.header, shard_rows=2**40, chunk_rows=2**20, hook_points={"a": 2**20})
    shard = msgspec.structs.replace(good.shards[0], contexts=2**37)
    (tmp_path / "t" / "manifest.jsonl").write_bytes(lines(huge, shard))
    tracemalloc.start()
    with pytest.raises(StoreError, match="damaged"):
        ActivationStore.open(tmp_path / "t").moments("a")
    with pytest.raises(StoreError, match="damaged"):
        ActivationStore.open(tmp_path / "t").read("a", 0, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
