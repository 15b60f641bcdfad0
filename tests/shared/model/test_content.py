"""Digests of files: of every byte, kept for large files, and never one of what a file held before."""

from __future__ import annotations

import hashlib
import os
from types import SimpleNamespace

import pytest

from thresher.shared.core.errors import MissingFileError
from thresher.shared.model import content
from thresher.shared.model.content import describe_files, file_digest, hub_commit, model_content


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that was settled long ago and is large enough to be kept, and the count of how often it is read."""
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 40)
    monkeypatch.setattr(content, "MIN_CACHED_BYTES", 1000)
    monkeypatch.setattr(content, "SETTLED_SECONDS", -1e9)
    probe = tmp_path / "probe"
    while probe.write_bytes(b"") or probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        pass  # until the file system's clock has ticked
    reads = []
    real = content._hash
    monkeypatch.setattr(content, "_hash", lambda file, progress: reads.append(file.name) or real(file, progress))
    return SimpleNamespace(path=path, cache=tmp_path / "cache", reads=reads)


def blake2b(path):
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def test_a_digest_is_of_every_byte(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(300_000))
    before = file_digest(path, tmp_path / "cache")
    assert before == blake2b(path)
    with path.open("r+b") as file:
        file.seek(123_457)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert file_digest(path, tmp_path / "cache") == blake2b(path) != before


def test_an_unchanged_large_file_is_read_once(large):
    assert {file_digest(large.path, large.cache) for _ in range(3)} == {blake2b(large.path)}
    assert len(large.reads) == 1


def test_small_files_are_always_read(large, monkeypatch):
    monkeypatch.setattr(content, "MIN_CACHED_BYTES", 1 << 20)
    assert {file_digest(large.path, large.cache) for _ in range(3)} == {blake2b(large.path)}
    assert len(large.reads) == 3


@pytest.mark.parametrize("change", ["edit", "edit and set the old time", "replace by a copy with the old time"])
def test_a_changed_file_is_read_again(large, change):
    status = large.path.stat()
    before = file_digest(large.path, large.cache)
    changed = large.path.read_bytes().replace(b"\x05", b"\x06", 1)  # the same size
    target = large.path.with_name("other") if "replace" in change else large.path
    target.write_bytes(changed)
    if "old time" in change:
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(target, large.path)
    assert file_digest(large.path, large.cache) == blake2b(large.path) != before


def test_the_digest_of_a_file_that_was_just_changed_is_not_kept(large, monkeypatch):
    monkeypatch.setattr(content, "SETTLED_SECONDS", 2.0)
    file_digest(large.path, large.cache)
    file_digest(large.path, large.cache)
    assert len(large.reads) == 2
    monkeypatch.setattr(content.time, "time", lambda: os.stat(large.path).st_ctime + 2.1)
    file_digest(large.path, large.cache)
    file_digest(large.path, large.cache)
    assert len(large.reads) == 3


def test_a_change_while_the_file_is_read_is_not_kept(large, monkeypatch):
    counted = content._hash

    def slow(file, progress):
        found = counted(file, progress)
        with large.path.open("ab") as end:
            end.write(b"more")
        return found

    monkeypatch.setattr(content, "_hash", slow)
    first = file_digest(large.path, large.cache)
    monkeypatch.setattr(content, "_hash", counted)
    assert file_digest(large.path, large.cache) == blake2b(large.path) != first


@pytest.mark.parametrize("entry", [b"", b"1 2 3 4 abc", b"\xff\xfe", b"0 0 0 0 " + b"0" * 32])
def test_a_damaged_cache_costs_time_alone(large, entry):
    file_digest(large.path, large.cache)
    (kept,) = (large.cache / content.CACHE_FOLDER).iterdir()
    kept.write_bytes(entry)
    assert file_digest(large.path, large.cache) == blake2b(large.path)
    assert len(large.reads) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(large):
    large.cache.write_text("a file, not a folder")
    assert file_digest(large.path, large.cache) == blake2b(large.path)


def test_names_count_and_their_order_does_not(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"22")
    found = describe_files({"a": one, "b": two})
    assert found.startswith("2 files, 3 bytes, blake2b ")
    assert describe_files({"b": two, "a": one}) == found
    assert describe_files({"b": one, "a": two}) != found
    assert describe_files({"a": one}).startswith("1 file, 1 bytes, blake2b ")
    with pytest.raises(MissingFileError, match="cannot read"):
        describe_files({"a": tmp_path / "gone"})


def test_a_models_weights_and_tokenizer_are_distinguished(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text(name)
    before = model_content(str(tmp_path))
    (tmp_path / "README.md").write_text("another")
    assert model_content(str(tmp_path)) == before
    for name, what in (
        ("config.json", "weights"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
    ):
        (tmp_path / name).write_text("another")
        after = model_content(str(tmp_path))
        assert {key for key in after if after[key] != before[key]} == {what}
        before = after


def test_a_hub_model_is_identified_by_its_commit(monkeypatch, tmp_path):
    import huggingface_hub

    def info(self, name, revision, timeout):
        if revision == "offline":
            raise OSError("no network")
        return SimpleNamespace(sha=f"sha of {name} at {revision}")

    cached = str(tmp_path / "snapshots" / "abc" / "config.json")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: cached)
    assert hub_commit("lab/m", "main") == "sha of lab/m at main"
    assert model_content("lab/m", "offline") == {"weights": "commit abc", "tokenizer": "commit abc"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    assert model_content("lab/m", "offline") == {"weights": None, "tokenizer": None}
