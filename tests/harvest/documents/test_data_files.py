"""Rows of data files: the values, and for every kind of damage the file and line, or how many were skipped."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.harvest.config import HarvestConfig
from thresher.harvest.documents import data_files
from thresher.harvest.documents.documents import read_documents
from thresher.shared.core.errors import DataError

TEXTS = ['one\ntwo, "three"\n', "größer ≥ 3 😀", "", "\tdef f():\r\n\treturn 1", "a\u2028b\u0085c\x00d"]
LINES = [json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(TEXTS)]
RAW = b"".join(LINES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def documents(dataset, report=False, **options):
    config = HarvestConfig(model="m", hook_points=["h"], store="s", dataset=str(dataset), **options)
    return list(read_documents(config, report=report))


def read(dataset, report=False, **options):
    return [document.text for document in documents(dataset, report, **options)]


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("several", [False, True])
def test_compressed_files(tmp_path, compression, several):
    compress = COMPRESSORS[compression]
    path = tmp_path / f"a.jsonl.{compression}"
    path.write_bytes(compress(RAW[:50]) + compress(RAW[50:]) if several else compress(RAW))
    assert read(path) == TEXTS
    text = tmp_path / "text" / f"a.txt.{compression}"
    text.parent.mkdir()
    text.write_bytes(compress(TEXTS[1].encode()))
    assert read(text.parent) == read(text) == [TEXTS[1]]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+'(, line \d)? cannot be read"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"[" + b",".join(LINES) + b"]",
        json.dumps([json.loads(line) for line in LINES], indent=4, ensure_ascii=False).encode(),
        b"\xef\xbb\xbf" + RAW,
        RAW.replace(b"\n", b"\r\n\r\n"),
        b"\n".join(json.dumps(json.loads(line), indent=2).encode() for line in LINES),
        json.dumps(TEXTS).encode(),
        RAW.replace(b'"id"', b'"score": NaN, "large": 123456789012345678901234567890, "id"'),
    ],
    ids=["array", "indented", "bom", "crlf", "objects", "strings", "nan"],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_layouts_of_json(tmp_path, content, chunk, monkeypatch):
    monkeypatch.setattr(data_files, "CHUNK_CHARACTERS", chunk)
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("value", [b"[" * 100_000 + b"]" * 100_000, b"9" * 5000], ids=["nested", "number"])
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_json_that_is_more_than_python_reads(tmp_path, value, layout):
    row = b'{"text": "a", "more": ' + value + b"}"
    name = {"lines": "a.jsonl", "array": "a.json"}[layout]
    (tmp_path / name).write_bytes(b"[" + row + b"]" if layout == "array" else row + b"\n" + LINES[0])
    with pytest.raises(DataError, match=r"line 1 (is nested too deeply|holds a number of thousands of digits)"):
        read(tmp_path / name)
    assert layout == "array" or read(tmp_path / name, on_bad_document="skip") == TEXTS[:1]


def test_a_text_file_begins_behind_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read(tmp_path / "a.txt") == ["one"]


def test_csv_and_tsv(tmp_path):
    rows = 'id,text\r\n1,"a ""b""\nc, d"\r\n\r\n2,\r\n3,e\tf\r\n'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert [tuple(d[:2]) for d in documents(tmp_path)] == [("1", 'a "b"\nc, d'), ("2", ""), ("3", "e\tf")]
    (tmp_path / "b.tsv").write_text('text\tid\n5" pipe, x\t1\n')
    assert read(tmp_path / "b.tsv") == ['5" pipe, x']
    long = "x" * 200_000
    (tmp_path / "c.csv").write_text(f"text\n{long}\n")
    assert read(tmp_path / "c.csv") == [long]


def test_arrow_stream_and_file(tmp_path):
    table = pa.table({"text": TEXTS, "other": [b"\xff"] * 5})
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "stream.arrow") == read(tmp_path / "file.arrow") == TEXTS
    whole = (tmp_path / "stream.arrow").read_bytes()
    for end, told in ((-8, "its end-of-stream marker is missing"), (-100, "cannot be read")):
        (tmp_path / "cut.arrow").write_bytes(whole[:end])
        with pytest.raises(DataError, match=told):
            read(tmp_path / "cut.arrow")


def write_parquet(path, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2, compression="none")


def test_parquet_of_other_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["a"], id=[7])
    write_parquet(tmp_path / "b.parquet", n=[1.5], text=["b"])
    write_parquet(tmp_path / "c.parquet", text=pa.array(["c"], pa.large_string()), id=["x"])
    assert [tuple(d[:2]) for d in documents(tmp_path)] == [("7", "a"), ("None", "b"), ("x", "c")]


def line(number, text):
    return [*LINES[: number - 1], text, *LINES[number:]]


BAD_LINES = {
    "cut": (b'{"text": "cut\n', "is not valid JSON: Invalid control character"),
    "halved": (b'{"text": "c"\n', "is not valid JSON: Expecting ',' delimiter"),
    "not JSON": (b"some prose\n", "is not valid JSON: Expecting value"),
    "two": (b'{"text": "a"}{"text": "b"}\n', "is not valid JSON: Extra data"),
    "NULs": (b"\x00\x00\x00\n", "is not valid JSON"),
    "NUL in text": (b'{"text": "a\x00"}\n', "is not valid JSON"),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', r"is not UTF-8 \(byte 14\)"),
    "surrogate": (b'{"text": "half \\ud83d here"}\n', "holds half of a surrogate pair"),
    "low surrogate": (b'{"text": "\\udc00"}\n', "holds half of a surrogate pair"),
    "surrogate elsewhere": (b'{"text": "a", "meta": {"b": ["\\ud83d\\ud83d"]}}\n', "holds half of a surrogate pair"),
    "null": (b'{"text": null}\n', "must hold text, .* in column 'text', got null"),
    "number": (b'{"text": 3}\n', "must hold text, .* in column 'text', got int"),
    "list": (b'{"text": ["a"]}\n', "must hold text, .* in column 'text', got list"),
    "column": (b'{"txt": "a", "b": {"c": 1}}\n', r"has no column 'text'; set text_column to one of txt, b\.c"),
    "ids": (b'{"text": [1, 2]}\n', "holds token ids in column 'text', where the rows before it hold text"),
    "row": (b'["text"]\n', "is not a JSON object, but an array"),
    "null row": (b"null\n", "is not a JSON object, but null"),
    "deep": (b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "is nested too deeply"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_damaged_line_is_named_or_skipped(tmp_path, kind, capsys):
    bad, told = BAD_LINES[kind]
    (tmp_path / "a.jsonl").write_bytes(b"".join(line(3, bad)))
    (tmp_path / "b.jsonl").write_bytes(RAW)
    with pytest.raises(DataError, match=rf"'{tmp_path}/a\.jsonl', line 3 {told}") as error:
        read(tmp_path)
    assert 'on_bad_document = "skip"' in str(error.value)
    assert len(str(error.value)) < 500
    rest = [text for i, text in enumerate(TEXTS) if i != 2]
    assert read(tmp_path, report=True, on_bad_document="skip") == rest + TEXTS
    said = capsys.readouterr().err
    assert said.startswith("text: read 2 files, 9 documents, ")
    assert f"; skipped 1 damaged, first '{tmp_path}/a.jsonl', line 3 " in said


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "utf16.jsonl": (RAW.decode().encode("utf-16"), "is UTF-16; convert it to UTF-8"),
    "utf16.csv": ("text\na\n".encode("utf-16"), "is UTF-16"),
    "lfs.jsonl": (LFS, "is a Git LFS pointer, .* git lfs pull"),
    "lfs.parquet": (LFS, "is a Git LFS pointer, .* git lfs pull"),
    "lfs.arrow": (LFS, "is a Git LFS pointer, .* git lfs pull"),
    "lfs.txt": (LFS, "is a Git LFS pointer, .* git lfs pull"),
    "named.jsonl": (gzip.compress(RAW), "is compressed by gzip"),
    "cut.jsonl.gz": (gzip.compress(RAW)[:30], "cannot be read: Compressed file ended before"),
    "no.jsonl.gz": (RAW, "cannot be read: Not a gzipped file"),
    "flipped.jsonl.gz": (gzip.compress(RAW)[:-8] + bytes(8), "cannot be read"),
    "cut.jsonl.zst": (zstd(RAW)[:30], "cannot be read: Truncated compressed stream"),
    "no.jsonl.zst": (b"(\xb5/\xfd", "cannot be read"),
    "no.jsonl.bz2": (RAW, "cannot be read: Invalid data stream"),
    "no.jsonl.xz": (RAW, "cannot be read"),
    "cut.txt.gz": (gzip.compress(RAW)[:30], "cannot be read"),
    "no.parquet": (RAW, "cannot be read: Parquet magic bytes not found"),
    "empty.parquet": (b"", "cannot be read"),
    "no.arrow": (RAW, "cannot be read"),
    "no.json": (b"[prose", "line 1 is not valid JSON"),
    "empty.csv": (b"", "is empty"),
    "header.csv": (b"a,b\nx,y\n", "has no column 'text'; set text_column to one of a, b"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_file_is_named_or_skipped(tmp_path, name, capsys):
    content, told = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"'{tmp_path}/{name}'(, line 1| is| has| cannot).*") as error:
        read(tmp_path)
    assert error.match(told)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(DataError, match=rf"no text in '{tmp_path}'; skipped 1 damaged, first '{tmp_path}/{name}'"):
        read(tmp_path, on_bad_document="skip")
    suffix = name.partition(".")[2].removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").removesuffix(".xz")
    good = tmp_path / f"zz.{suffix}"
    if suffix == "parquet":
        write_parquet(good, text=["good"])
    elif suffix == "arrow":
        with pa.ipc.new_stream(good, pa.schema({"text": pa.string()})) as writer:
            writer.write(pa.record_batch({"text": ["good"]}))
    else:
        good.write_text({"csv": "text\ngood\n", "txt": "good"}.get(suffix, '{"text": "good"}\n'))
    assert read(tmp_path, report=True, on_bad_document="skip") == ["good"]
    assert "skipped 1 damaged" in capsys.readouterr().err


def test_a_file_that_is_cut_off_is_named_with_the_last_row(tmp_path):
    lines = [json.dumps({"text": f"{i} {'x' * (i * 7919 % 911)}"}).encode() + b"\n" for i in range(5000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines))[:-2000])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz', line \d\d+ cannot be read: Compressed file ended"):
        read(tmp_path)
    good = read(tmp_path, on_bad_document="skip")
    assert good == [json.loads(line)["text"] for line in lines[: len(good)]]
    assert 1000 < len(good) < 5000


def test_damaged_arrays_of_json(tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps([{"text": str(i)} for i in range(9)], indent=1)
    for damaged, told in (
        (text[:-1], r"line 29 the file is cut off: the array's closing \] is missing"),
        (text[:-9], "line 27 is not valid JSON"),
        (text.replace('"4"', "4x"), "line 15 is not valid JSON"),
        (text.replace('"4"', '"\\ud83d"'), "line 14 holds half of a surrogate pair"),
        (text.replace('"4"', "null"), "line 14 must hold text, .* got null"),
        (text + "more", r"line 29 has more text after the array's closing \]"),
        ('{"text":\n "a",\n "b"}', "line 3 is not valid JSON"),
    ):
        path.write_text(damaged)
        with pytest.raises(DataError, match=told):
            read(path)
    path.write_text(text.replace('"4"', "null"))
    assert read(path, on_bad_document="skip") == [str(i) for i in range(9) if i != 4]


@pytest.mark.parametrize(
    ("content", "told", "rest"),
    [
        (b'text,n\na,1\n"b,2\nc,3\n', "line 3 is not valid CSV: unexpected end of data", ["a"]),
        (b'text,n\na,1\n"b" c,2\nd,3\n', "line 3 is not valid CSV: ',' expected after '\"'", ["a", "d"]),
        (b"text,n\na,1\nb\nd,3\n", "line 3 has 1 fields where the header has 2", ["a", "d"]),
        (b"text,n\na,1\nb,2,3\nd,3\n", "line 3 has 3 fields where the header has 2", ["a", "d"]),
        (b"text,n\na,1\ncaf\xe9,2\nd,3\n", "line 3 is not UTF-8", ["a", "d"]),
        (b"text,n\na,1\nb\x00,2\nd,3\n", "line 3 holds NUL bytes", ["a", "d"]),
        (b"text,text\na,1\n", "has the column 'text' twice", None),
    ],
)
def test_damaged_csv(tmp_path, content, told, rest):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=told):
        read(tmp_path)
    if rest:
        assert read(tmp_path, on_bad_document="skip") == rest


def test_damaged_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["a", None, "c", "d"])
    with pytest.raises(DataError, match=r"a\.parquet', row 1 must hold text, .* got null"):
        read(tmp_path)
    assert read(tmp_path, on_bad_document="skip") == ["a", "c", "d"]
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.parquet' cannot be read: Parquet magic bytes not found"):
        read(tmp_path)
    write_parquet(tmp_path / "a.parquet", text=["a"], other=["b"])
    write_parquet(tmp_path / "b.parquet", body=["c"])
    with pytest.raises(DataError, match=r"b\.parquet' has no column 'text'; set text_column to one of body"):
        read(tmp_path)
    assert read(tmp_path, on_bad_document="skip") == ["a"]


def test_a_page_that_is_damaged_midway(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=[f"text {i}" * 100 for i in range(8)])
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(3).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 20] = b"\xff" * 20
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet'.* cannot be read"):
        read(tmp_path)


def test_nested_columns(tmp_path):
    row = {"data": {"text": "in", "meta": {"id": 1}}, "data.meta.id": "flat"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    write_parquet(tmp_path / "a.parquet", **{key: [value] for key, value in row.items()})
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, text_column="data.text") == ["in"]
        assert read(tmp_path / name, text_column="data.meta.id") == ["flat"]
    with pytest.raises(
        DataError, match=r"has no column 'data\.txt'; set text_column to one of data\.text, data\.meta\.id"
    ):
        read(tmp_path / "a.jsonl", text_column="data.txt")


def test_conversations_and_token_ids(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "tool", "value": "t"}]
    rows = {"messages": messages, "conversations": sharegpt, "ids": [3, 1, 4], "flags": [True], "empty": []}
    (tmp_path / "a.jsonl").write_text(json.dumps(rows))
    write_parquet(tmp_path / "a.parquet", **{key: [value] for key, value in rows.items() if value})
    for name in ("a.jsonl", "a.parquet"):
        path = tmp_path / name
        assert documents(path, text_column="messages") == [("row 0", "", messages, None)]
        assert documents(path, text_column="conversations")[0].messages == [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "tool", "content": "t"},
        ]
        assert documents(path, text_column="ids") == [("row 0", "", None, [3, 1, 4])]
        with pytest.raises(DataError, match="in column 'flags', got list"):
            documents(path, text_column="flags")
    assert documents(tmp_path / "a.jsonl", text_column="empty")[0].messages == []


def test_lists_that_are_written_as_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("""messages,input_ids,text\n"[{'role': 'user'}]","[1, 2]",[brackets]\n""")
    for column in ("messages", "input_ids"):
        with pytest.raises(DataError, match=f"in column '{column}', got a list that is written as text"):
            read(tmp_path, text_column=column)
    assert read(tmp_path) == ["[brackets]"]
    (tmp_path / "b.jsonl").write_text('{"data": {"text": "a", "meta": {"n": 1}}}')
    with pytest.raises(DataError, match=r"got the nested columns data\.text, data\.meta\.n"):
        read(tmp_path / "b.jsonl", text_column="data")


def test_the_summary_counts_messages_and_token_ids(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"m": [{"role": "user", "content": "four"}], "i": [1, 2]}\n' * 1000)
    documents(tmp_path, report=True, text_column="m")
    documents(tmp_path, report=True, text_column="i")
    assert capsys.readouterr().err == (
        f"text: read 1 file, 1,000 documents, 4,000 characters from '{tmp_path}'\n"
        f"text: read 1 file, 1,000 documents, 2,000 token ids from '{tmp_path}'\n"
    )


def test_reading_that_ends_early_says_how_far_it_came(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n' * 3)
    config = HarvestConfig(model="m", hook_points=["h"], store="s", dataset=str(tmp_path))
    reader = read_documents(config, report=True)
    for _ in range(4):
        next(reader)
    assert capsys.readouterr().err == ""
    reader.close()
    assert capsys.readouterr().err == f"text: read 2 of 3 files, 4 documents, 4 characters from '{tmp_path}'\n"


def test_rows_of_a_hub_dataset_are_checked(monkeypatch):
    rows = {"text": ["a", None, "c"], "id": [1, 2, 3], "n": [1, 2, 3]}
    for streams in (False, True):
        made = datasets.Dataset.from_dict(rows)
        made = made.to_iterable_dataset() if streams else made
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, made=made, **k: made)
        with pytest.raises(DataError, match=r"'org/corpus', row 1 must hold text, .* got null"):
            read("org/corpus")
        assert read("org/corpus", on_bad_document="skip") == ["a", "c"]
        with pytest.raises(DataError, match="'org/corpus' has no column 'body'; set text_column to one of text, id, n"):
            read("org/corpus", text_column="body")


def test_a_stream_that_breaks_is_one_line(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise pa.ArrowInvalid("bad\nbytes")

    made = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    with pytest.raises(DataError, match=r"'org/corpus', row 0: the dataset cannot be read beyond here; .*bad bytes"):
        read("org/corpus")


def test_memory_for_one_large_row_group_stays_bounded(tmp_path):
    rows = [f"{i} " * 1000 for i in range(8_000)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    config = HarvestConfig(model="m", hook_points=["h"], store="s", dataset=str(tmp_path))
    before, peak, n_characters = pa.total_allocated_bytes(), 0, 0
    for document in read_documents(config):
        peak = max(peak, pa.total_allocated_bytes() - before)
        n_characters += len(document.text)
    assert n_characters == sum(map(len, rows))
    assert peak < 10_000_000 < n_characters


def test_memory_stays_bounded(tmp_path):
    import tracemalloc

    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": "x" * 1000}) for _ in range(20_000)) + "]")
    config = HarvestConfig(model="m", hook_points=["h"], store="s", dataset=str(path))
    tracemalloc.start()
    n_characters = sum(len(document.text) for document in read_documents(config))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_characters == 20_000_000
    assert peak < 10_000_000
