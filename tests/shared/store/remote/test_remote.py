"""A store in an object store is, byte for byte, the one it would be in a folder, and is read by a bounded cache."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import ConfigError, MissingFileError, StoreBusyError, StoreError, UnreachableError
from thresher.shared.core.location import cache_limit, locate
from thresher.shared.store.command import main
from thresher.shared.store.format.codecs import encode_chunk
from thresher.shared.store.remote.lease import LEASE
from thresher.shared.store.remote.objects import RemoteStore
from thresher.shared.store.remote.remote_files import RemoteShardCache
from thresher.shared.store.write import encode

N, CONTEXT, WIDTHS = 41, 8, {"a": 12, "b": 5}


def write(place, codec="lz4", stop=N, **settings):
    """Write the test's store, or resume it, up to a context; before the last context it stays unfinished."""
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(N, CONTEXT, d, generator=generator) for name, d in WIDTHS.items()}
    tokens = torch.arange(N * CONTEXT).reshape(N, CONTEXT)
    settings = {"chunk_bytes": 200, "shard_bytes": 2000, "mask_token_ids": [5]} | settings
    writer = ActivationStoreWriter(place, WIDTHS, CONTEXT, codec=codec, **settings)
    first = writer.n_committed_contexts
    try:
        for i in range(first, stop, 3):
            part = {name: values[i : min(i + 3, stop)] for name, values in rows.items()}
            documents = torch.arange(i, min(i + 3, stop))[:, None].expand(-1, CONTEXT)
            held_out = documents[:, 0] % 4 == 0
            writer.append(part, tokens[i : min(i + 3, stop)], held_out=held_out, documents=documents)
    finally:
        writer.close() if stop == N else writer.abandon()
    return first


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def copies(tmp_path: Path) -> dict[str, int]:
    return {path.name.split("~", 1)[1]: path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()}


@pytest.mark.parametrize("codec", ["none", "lz4", "int8"])
def test_every_object_is_the_file_of_a_local_store(s3, objects, tmp_path, codec):
    url = s3()
    write(tmp_path / "local", codec)
    write(url, codec)
    assert objects.read(url) == tree(tmp_path / "local")
    assert len(ActivationStore.open(url).manifest.shards) >= 3, "the test must cross shards"
    staging = tmp_path / "cache" / "writing"
    assert [path.suffix for path in staging.iterdir()] == [".lock"], "nothing is left of the staging folder"


def extend(place, n=N, keep=None):
    """Write a store of so many contexts of the test's, or extend it to them."""
    rows = {name: torch.arange(n * CONTEXT * d).reshape(n, CONTEXT, d) % 97 for name, d in WIDTHS.items()}
    sizes = {"chunk_bytes": 200, "shard_bytes": 2000, "n_contexts": n, "keep_contexts": keep}
    with ActivationStoreWriter(place, WIDTHS, CONTEXT, metadata={"n": n}, **sizes) as writer:
        first = writer.n_committed_contexts
        if first < n:
            writer.append({name: part[first:].float() for name, part in rows.items()})


@pytest.mark.parametrize(("before", "keep"), [(29, 25), (29, 0), (24, 24), (3, 3)])
def test_an_extended_store_is_the_one_written_at_once(s3, objects, tmp_path, before, keep):
    extend(tmp_path / "whole")
    url = s3()
    extend(url, before)
    extend(url, keep=keep)
    assert objects.read(url) == tree(tmp_path / "whole")
    assert [path.suffix for path in (tmp_path / "cache" / "writing").iterdir()] == [".lock"]
    assert ActivationStore.open(url).verify() == []


@pytest.mark.parametrize("fails_at", range(1, 12, 2))
def test_an_extension_that_stops_at_any_request_leaves_a_store_that_is_extended_again(
    s3, objects, tmp_path, fails_at, monkeypatch
):
    extend(tmp_path / "whole")
    url = s3()
    extend(url, 29)
    before = objects.read(url)
    puts = []
    with monkeypatch.context() as patch:
        for name in ("put", "replace"):
            original = getattr(RemoteStore, name)

            def counted(self, key, *arguments, original=original):
                if key != LEASE:
                    puts.append(key)
                    if len(puts) >= fails_at:
                        raise UnreachableError("the connection is gone")
                return original(self, key, *arguments)

            patch.setattr(RemoteStore, name, counted)
        with pytest.raises(UnreachableError):
            extend(url, keep=25)
    store = ActivationStore.open(url)
    assert store.n_contexts >= 20  # two whole shards of those that may be kept
    assert [fault for fault in store.verify() if "not finished" not in fault] == []
    if fails_at == 1:
        assert objects.read(url) == before
    extend(url, keep=25)
    assert objects.read(url) == tree(tmp_path / "whole")


@pytest.mark.parametrize(("codec", "cache_bytes"), [("zstd", None), ("none", 6000), ("int8", 4000), ("int8", 0)])
def test_every_read_equals_the_local_one(s3, tmp_path, codec, cache_bytes):
    url = s3()
    write(tmp_path / "local", codec)
    write(url, codec)
    local = ActivationStore.open(tmp_path / "local")
    remote = ActivationStore.open(url, cache_bytes=cache_bytes)
    assert str(remote.path) == url
    assert (remote.n_rows, remote.metadata, remote.complete) == (local.n_rows, local.metadata, True)
    chunks = np.random.default_rng(0).permutation(local.n_chunks)
    for name in WIDTHS:
        assert torch.equal(remote.read_chunks(name, chunks), local.read_chunks(name, chunks))
        assert torch.equal(remote.read(name, 11, 300), local.read(name, 11, 300))
        assert np.array_equal(remote.moments(name).M2, local.moments(name).M2)
    assert torch.equal(remote.tokens(3, 320), local.tokens(3, 320))
    assert np.array_equal(remote.training_mask(0, 328), local.training_mask(0, 328))
    assert np.array_equal(remote.documents(0, 328)[0], local.documents(0, 328)[0])
    assert remote.verify() == []
    again = pickle.loads(pickle.dumps(remote))
    assert torch.equal(again.read("a", 0, 100), local.read("a", 0, 100))


def test_copies_stay_within_the_bound_and_the_latest_used_stay(s3, tmp_path):
    url = s3()
    write(url, "none")
    sizes = {key: f.bytes for r in ActivationStore.open(url).manifest.shards for key, f in r.files.items()}
    rows = ActivationStore.open(url).shard_rows
    limit = 3 * sizes["a/c.0.0"]
    store = ActivationStore.open(url, cache_bytes=limit)
    for shard in (0, 1, 2, 0, 3):
        store.read("a", shard * rows, (shard + 1) * rows)
        assert sum(copies(tmp_path).values()) <= limit
    assert sorted(copies(tmp_path)) == ["a~c.0.0", "a~c.2.0", "a~c.3.0"], "shard 1 was used longest ago"
    cache = store._chunks.caches["a"]
    assert isinstance(cache, RemoteShardCache)
    assert sorted(cache._mapped) == [0, 2, 3], "what was evicted is no longer mapped, so that its room is free"
    ActivationStore.open(url, cache_bytes=limit // 3)
    assert sorted(copies(tmp_path)) == ["a~c.3.0"], "a lower bound holds at once"


def test_a_store_beyond_the_cache_is_read_chunk_by_chunk(s3, proxy, tmp_path):
    url = s3()
    write(tmp_path / "local", "none", chunk_bytes=1000, shard_bytes=20_000)
    write(url, "none", chunk_bytes=1000, shard_bytes=20_000)
    local, store = ActivationStore.open(tmp_path / "local"), ActivationStore.open(url, cache_bytes=6000)
    before = proxy.bytes_down
    chunk = local.n_chunks // 2
    assert torch.equal(store.read_chunks("a", [chunk]), local.read_chunks("a", [chunk]))
    assert proxy.bytes_down - before < 4000, "a chunk and a footer, not the whole shard"
    assert not (tmp_path / "cache" / "shards").exists()


def test_a_copy_that_went_bad_is_fetched_again(s3, tmp_path):
    url = s3()
    write(tmp_path / "local")
    write(url)
    expected = ActivationStore.open(tmp_path / "local").read("a", 0, 328)
    ActivationStore.open(url).read("a", 0, 328)
    for name, at in (("a~c.0.0", 3), ("a~c.1.0", -3)):  # a chunk, a footer
        copy = next(path for path in (tmp_path / "cache" / "shards").iterdir() if path.name.endswith(name))
        content = bytearray(copy.read_bytes())
        content[at] ^= 1
        copy.write_bytes(content)
    assert torch.equal(ActivationStore.open(url).read("a", 0, 328), expected)


def test_a_copy_that_went_bad_is_not_taken_from_another_thread(s3, tmp_path, monkeypatch):
    """Threads that begin together each open the copy; one that is slow keeps it after another had let go of it."""
    url = s3()
    write(url, "none")
    store = ActivationStore.open(url)
    expected = store.read("a", 0, store.chunk_rows)
    copy = next(path for path in (tmp_path / "cache" / "shards").iterdir() if path.name.endswith("a~c.0.0"))
    content = bytearray(copy.read_bytes())
    content[3] ^= 1
    copy.write_bytes(content)
    store = ActivationStore.open(url, threads=1)
    cache = store._chunks.caches["a"]
    assert isinstance(cache, RemoteShardCache)
    cache.prepare(np.array([0]))
    bad = cache.shard(0)
    monkeypatch.setattr(cache, "shard", lambda number: bad)
    assert torch.equal(store.read("a", 0, store.chunk_rows), expected)
    assert not copy.exists() or copy.read_bytes() != bytes(content)


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_a_chunk_that_has_its_checksum_and_does_not_decode_is_named(s3, monkeypatch, cache_bytes):
    """As a writer with faulty memory leaves it: fetching it again does not help."""

    def cut_short(array, rows, level):
        return np.frombuffer(encode_chunk(array, rows, level), dtype=np.uint8)[:-1]

    url = s3()
    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_chunk", cut_short)
        write(url)
    store = ActivationStore.open(url, cache_bytes=cache_bytes)
    where = f"^the store '{url}' is damaged: 'a/c.0.0', chunk 0: array 'a': expected a blosc buffer of"
    with pytest.raises(StoreError, match=where):
        store.read("a", 0, 1)


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_an_object_that_was_changed_is_named_and_never_read(s3, objects, tmp_path, cache_bytes, capsys):
    url = s3()
    write(url)
    good = objects.read(url)

    def flipped(key: str, at: int) -> bytes:
        content = bytearray(good[key])
        content[at] ^= 4
        return bytes(content)

    injuries = [
        ("a/c.2.0", flipped("a/c.2.0", 5), "c.2.0', chunk 0"),
        ("a/c.2.0", flipped("a/c.2.0", -3), "footer"),
        ("a/c.2.0", good["a/c.2.0"][:-1], "bytes; expected"),
        ("a/c.2.0", good["a/c.1.0"], "a/c.2.0"),
    ]
    for key, content, message in injuries:
        objects.write(url, key, content)
        store = ActivationStore.open(url, cache_bytes=cache_bytes, cache=tmp_path / "other")
        with pytest.raises(StoreError, match=message):
            store.read("a", 2 * store.shard_rows, 3 * store.shard_rows)
        assert main(["verify", url]) == 1
        assert "a/c.2.0" in capsys.readouterr().out
    objects.write(url, "a/c.2.0", good["a/c.2.0"])
    for key in ("statistics.safetensors", "provenance/00001.parquet", "manifest.jsonl", "a/zarr.json"):
        objects.write(url, key, flipped(key, 40))
        with pytest.raises(StoreError, match=key):
            ActivationStore.open(url).moments("a"), ActivationStore.open(url).documents(0, 300)
        objects.write(url, key, good[key])
    assert ActivationStore.open(url).verify() == []


def test_the_command_reads_a_url(s3, capsys):
    url = s3()
    write(url)
    assert main(["info", url]) == 0
    assert main(["sample", url, "--contexts", "2"]) == 0
    out = capsys.readouterr().out
    assert f"{url}: complete" in out
    assert "a: norms of mean" in out
    assert main(["info", url + "x"]) == 2
    assert f"no activation store at '{url}x'" in capsys.readouterr().err


def test_only_one_writer_and_only_of_the_same_store(s3, tmp_path):
    url = s3()
    write(url, stop=20)
    assert not ActivationStore.open(url).complete
    with ActivationStoreWriter(s3(), WIDTHS, CONTEXT) as writer:
        busy = str(writer.path)
        with pytest.raises(StoreBusyError, match="another process is writing"):
            ActivationStoreWriter(busy, WIDTHS, CONTEXT)
        with pytest.raises(StoreBusyError, match=r"another process is writing .*run again in 1[12]\d seconds"):
            ActivationStoreWriter(busy, WIDTHS, CONTEXT, cache=tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=f"'{url}' was begun with codec = 'lz4', now asked for 'none'"):
        write(url, "none")
    with pytest.raises(StoreError, match="holds other objects and no store"):
        ActivationStoreWriter(url.rpartition("/")[0], WIDTHS, CONTEXT)


def test_places_that_cannot_hold_a_store_are_refused(s3, monkeypatch):
    assert locate("some/folder") == Path("some/folder")
    assert str(locate("S3://bucket/a/b/")) == "s3://bucket/a/b"
    for place in ("ftp://host/store", "s3://bucket", "s3://bucket/", "s3:///x", "s3://bucket/../x", "s3://bucket/a//b"):
        with pytest.raises(ConfigError, match="cannot keep a store at"):
            ActivationStore.open(place)
    with pytest.raises(MissingFileError, match="no activation store at 's3://bucket/nothing'"):
        ActivationStore.open("s3://bucket/nothing")
    with pytest.raises(MissingFileError, match=r"no such object or bucket|no activation store"):
        ActivationStore.open("s3://no-such-bucket/nothing")
    for text, expected in (("200GB", 200 * 10**9), ("64GiB", 64 << 30), ("5", 5), ("1 kB", 1000), ("", 64 << 30)):
        monkeypatch.setenv("THRESHER_CACHE_BYTES", text)
        assert cache_limit() == expected
    monkeypatch.setenv("THRESHER_CACHE_BYTES", "lots")
    with pytest.raises(ConfigError, match="expected a number of bytes"):
        cache_limit()
