"""Text sources: what was written comes back, in a fixed order, or a clear error."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.harvest.config import HarvestConfig
from thresher.harvest.documents.documents import read_documents, source_files
from thresher.harvest.prefetch import Prefetch
from thresher.shared import ActivationStoreWriter
from thresher.shared.core.errors import DataError, MissingFileError

TEXTS = ["one\ntwo\n", "", "größer ≥ 3", "def f():\n\treturn 1\n"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def config_of(dataset, **options):
    return HarvestConfig(model="m", hook_points=["h"], store="s", dataset=str(dataset), **options)


def read(dataset, report=False, **options):
    """Return the names and texts of a dataset's documents."""
    return [document[:2] for document in read_documents(config_of(dataset, **options), report=report)]


def contents(dataset, **options):
    """Return the documents of a dataset without their names."""
    return [document[1:] for document in read_documents(config_of(dataset, **options))]


def texts(documents):
    return [text for _, text in documents]


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_python_stdlib_is_this_interpreters():
    documents = read("python-stdlib")
    again = read("python-stdlib", seed=0)
    other = read("python-stdlib", seed=1)
    assert documents == again
    assert documents != other
    assert sorted(documents) == sorted(other)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    names = {name for name, _ in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name for name in names)
    by_name = dict(documents)
    assert by_name["argparse.py"] == (stdlib / "argparse.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_stores_beside_the_text_are_left_out(tmp_path, capsys, name):
    (tmp_path / name).write_text('{"text": "one"}\n')
    before = contents(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for store in (tmp_path / "runs" / "store", tmp_path / "elsewhere" / "other"):
        with ActivationStoreWriter(store, {"h": 4}, 2, n_contexts=1) as writer:
            assert contents(tmp_path) == before  # while it is written
            writer.append({"h": np.ones((1, 2, 4), np.float32)}, held_out=[False])
            writer.write_beside("harvest.toml", "model = 1")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "other")
    capsys.readouterr()
    assert [document[1] for document in read(tmp_path, report=True)] == [document[0] for document in before]
    assert "3 activation stores (elsewhere/other, link, runs/store)" in capsys.readouterr().err
    with pytest.raises(DataError, match="is an activation store; expected the text"):
        read(tmp_path / "runs" / "store")


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXTS[2], encoding="utf-8")
    assert read(path) == [("a.txt", TEXTS[2])]


def test_a_folder_of_text(tmp_path, capsys):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "file.md").write_bytes(text.encode())
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden").write_text("no")
    documents = read(tmp_path, report=True)
    assert sorted(documents) == [(f"{i}/file.md", text) for i, text in enumerate(TEXTS)]
    assert documents == read(tmp_path)
    n_characters = sum(map(len, TEXTS))
    assert capsys.readouterr().err == (
        f"text: from '{tmp_path}', left out: 1 hidden (.hidden)\n"
        f"text: read 5 files, 4 documents, {n_characters} characters from '{tmp_path}'; "
        "left out: 1 hidden (.hidden), 1 not UTF-8 text (binary.bin)\n"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    write_jsonl(tmp_path / name, [{"text": text, "url": f"u{i}"} for i, text in enumerate(TEXTS)])
    assert read(tmp_path / name) == [(f"u{i}", text) for i, text in enumerate(TEXTS)]


def test_a_folder_of_parquet_is_read_in_path_order(tmp_path):
    for i in (1, 0):
        pq.write_table(pa.table({"content": TEXTS[2 * i : 2 * i + 2]}), tmp_path / f"part{i}.parquet")
    documents = read(tmp_path, text_column="content")
    assert texts(documents) == TEXTS
    assert documents[3][0] == "row 3"


def test_arrow_and_a_saved_dataset(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "id": [7, 8, 9, 10]})
    dataset.save_to_disk(tmp_path / "saved")
    expected = [(str(i + 7), text) for i, text in enumerate(TEXTS)]
    assert read(tmp_path / "saved") == expected
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert read(arrow) == expected
    datasets.DatasetDict({"valid": dataset}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict", split="valid") == expected
    with pytest.raises(DataError, match="no split 'train'; set split to one that it has: valid"):
        read(tmp_path / "dict")


def test_a_dataset_id_goes_to_load_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read("org/corpus", dataset_config="en", split="validation", streaming=True, dataset_revision="v1")
    assert texts(documents) == TEXTS
    assert calls == [(("org/corpus", "en"), {"split": "validation", "revision": "v1", "streaming": True})]


def test_files_of_a_dataset_id(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append(kwargs["data_files"])
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(read("org/corpus", files=["en/*.jsonl"], split="validation")) == TEXTS
    assert calls == [{"validation": ["en/*.jsonl"]}]


def test_an_unreachable_dataset_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"(?m)cannot load dataset 'org/corpus'.*Couldn't reach the Hub more$"):
        read("org/corpus")


def test_missing_files_and_columns(tmp_path):
    for dataset in (tmp_path / "no", "a.jsonl", "./here", "a/b/c"):
        with pytest.raises(MissingFileError, match="no text at"):
            read(dataset)
    write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "n": 1}])
    with pytest.raises(DataError, match="line 1 has no column 'text'; set text_column to one of body, n;"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"line 1 must hold text, .* in column 'n', got int;"):
        read(tmp_path / "a.jsonl", text_column="n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files in"):
        read(tmp_path / "empty")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="mixes json and parquet"):
        read(tmp_path)


def test_messages_and_token_ids(tmp_path):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "ids": [3, 1, 4]}])
    assert contents(tmp_path / "a.jsonl", text_column="messages") == [("", messages, None)]
    assert contents(tmp_path / "a.jsonl", text_column="ids") == [("", None, [3, 1, 4])]
    with pytest.raises(DataError, match="line 1 has no column 'text'; set text_column to one of messages, ids;"):
        contents(tmp_path / "a.jsonl")


def test_source_files_are_those_that_are_read(tmp_path):
    for name in ("b.txt", "a/c.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert source_files(config_of(tmp_path)) == [tmp_path / "a/c.txt", tmp_path / "b.txt"]
    assert source_files(config_of(tmp_path / "b.txt")) == [tmp_path / "b.txt"]
    assert source_files(config_of("org/corpus")) is None


def test_prefetch_keeps_order_and_passes_errors_on():
    with Prefetch(iter(range(50)), 3) as items:
        assert list(items) == list(range(50))

    def fails():
        yield 1
        raise DataError("gone")

    with Prefetch(fails(), 3) as items:
        assert next(items) == 1
        with pytest.raises(DataError, match="gone"):
            next(items)


def test_prefetch_stops_early():
    made = []

    def endless():
        while True:
            made.append(1)
            yield len(made)

    with Prefetch(endless(), 2) as items:
        assert next(items) == 1
    n_made = len(made)
    assert n_made <= 5
