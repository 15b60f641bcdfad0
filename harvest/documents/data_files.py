"""Read the rows of JSON Lines, JSON, CSV, TSV, Parquet and Arrow files one by one, in bounded memory.

Damage is reported with its file and line or row, and raises `DataError` or is counted (`Tally.bad`).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import msgspec

from ...shared.core.errors import DataError
from .columns import SKIP, Columns
from .find_files import COMPRESSIONS, format_of, suffix_of
from .tally import RowLocation, Tally

DataRow = dict[str, Any]
HEAD_BYTES = 1 << 16
CHUNK_CHARACTERS = 1 << 20
MAX_VALUE_CHARACTERS = 1 << 28
ROWS_AT_ONCE = 256
BUFFER_BYTES = 1 << 20
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
LFS = b"version https://git-lfs.github.com/spec/"
_SIGNATURES = {
    LFS: "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
    b"\x1f\x8b": "is compressed by gzip; give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; give it a name that ends in .zst",
    b"PK\x03\x04": "is a ZIP archive; unpack it",
    b"PAR1": "is a Parquet file; give it a name that ends in .parquet",
}
_BOM = b"\xef\xbb\xbf"
_LONE = "holds half of a surrogate pair, which no text may"
_BLANK = re.compile(r"[ \t\r\n,]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

csv.field_size_limit(MAX_VALUE_CHARACTERS)


def read_error(path: Path, error: BaseException) -> str:
    """Return why the rest of a file cannot be read; raise `DataError` if none of it can."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        raise DataError(f"cannot read '{path}': {error.strerror}") from None
    return "cannot be read: " + (" ".join(str(error).split()) or type(error).__name__)


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if suffix == ".zst":
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd"), HEAD_BYTES))
    return path.open("rb")


def signature(head: bytes) -> str | None:
    """Return what is wrong with a text file that starts with these bytes, if it is recognised; else None."""
    return next((names for magic, names in _SIGNATURES.items() if head.startswith(magic)), None)


def damage() -> tuple[type[BaseException], ...]:
    """Return the exceptions that reading a damaged file raises."""
    import pyarrow as pa

    return (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError, pa.ArrowException)


class DataFile:
    """One data file, whose rows can be iterated over once; `at` is the location of the last row read."""

    def __init__(self, path: Path, columns: Columns, tally: Tally) -> None:
        self.path = path
        self.at = RowLocation(str(path), "line")
        self._columns = columns
        self._tally = tally
        self._csv_line = 0

    def __iter__(self) -> Iterator[DataRow]:
        kind = format_of(self.path.name)
        try:
            if kind == "json":
                yield from self._json()
            elif kind == "csv":
                yield from self._csv()
            else:
                self.at.unit, self.at.number = "row", -1
                yield from self._parquet() if kind == "parquet" else self._arrow()
        except damage() as error:
            where = self.at if self.at.number > 0 else self.at.source
            self._tally.bad(where, read_error(self.path, error))

    def _head(self) -> bytes | None:
        """Return a text file's first bytes; None if they show that it cannot be read."""
        with open_bytes(self.path) as file:
            head = file.read(HEAD_BYTES)
        fault = signature(head) or (None if head.strip() else "is empty")
        if fault:
            self._tally.bad(self.at.source, fault)
        return None if fault else head

    def _json(self) -> Iterator[DataRow]:
        head = self._head()
        if head is None:
            return
        head = head.removeprefix(_BOM).lstrip()
        whole = head.startswith(b"[")
        if head.startswith(b"{") and suffix_of(self.path.name) == ".json" and b"\n" in head:
            whole = _decode(head.partition(b"\n")[0])[0] is None  # an object over several lines
        with open_bytes(self.path) as file:
            if not whole:
                yield from self._json_lines(file)
                return
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
                yield from self._json_values(text, head.startswith(b"["))

    def _json_lines(self, file: BinaryIO) -> Iterator[DataRow]:
        decode = msgspec.json.Decoder().decode
        for number, line in enumerate(file, 1):
            self.at.number = number
            try:
                row = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.isspace() or not line:
                    continue
                row, fault = _decode(line)
                if fault:
                    self._tally.bad(self.at, fault)
                    continue
            if isinstance(row, dict):
                yield row
            else:
                self._tally.bad(self.at, f"is not a JSON object, but {_json_kind(row)}")

    def _json_values(self, text: TextIO, is_array: bool) -> Iterator[DataRow]:
        """Yield the objects of an array, or objects that span several lines."""
        decode = json.JSONDecoder().raw_decode
        buffer, position, size = text.read(CHUNK_CHARACTERS), 0, CHUNK_CHARACTERS
        if is_array:
            position = buffer.index("[") + 1
        line, counted = 1, 0
        while True:
            blank = _BLANK.match(buffer, position)
            position = blank.end() if blank else position
            line, counted = line + buffer.count("\n", counted, position), position
            self.at.number = line
            ended = is_array and buffer.startswith("]", position)
            if ended:
                rest = buffer[position + 1 :] + text.read(CHUNK_CHARACTERS)
                if rest.strip():
                    self._tally.bad(self.at, "has more text after the array's closing ]")
                return
            try:
                row, end = decode(buffer, position)
            except json.JSONDecodeError as error:
                more = text.read(size) if len(buffer) - position < MAX_VALUE_CHARACTERS else ""
                if more:
                    buffer, position, counted, size = buffer[position:] + more, 0, 0, 2 * size
                elif position < len(buffer):
                    self.at.number += buffer.count("\n", position, error.pos)
                    self._tally.bad(self.at, f"is not valid JSON: {error.msg}")
                    return
                elif is_array:
                    self._tally.bad(self.at, "the file is cut off: the array's closing ] is missing")
                    return
                else:
                    return
                continue
            except (RecursionError, ValueError) as error:
                return self._tally.bad(self.at, _beyond(error))
            if _SURROGATE.search(buffer, position, end) and not _is_encodable(row):
                self._tally.bad(self.at, _LONE)
            elif isinstance(row, dict):
                yield row
            elif isinstance(row, str):
                yield {"text": row}
            else:
                self._tally.bad(self.at, f"is not a JSON object, but {_json_kind(row)}")
            position, size = end, CHUNK_CHARACTERS

    def _csv(self) -> Iterator[DataRow]:
        if self._head() is None:
            return
        delimiter = "\t" if suffix_of(self.path.name) == ".tsv" else ","
        with open_bytes(self.path) as file:
            reader = csv.reader(self._decoded_lines(file), delimiter=delimiter, strict=True)
            header: list[str] | None = None
            while True:
                self._csv_line = 0
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    self.at.number = self._csv_line
                    self._tally.bad(self.at, f"is not valid CSV: {error}")
                    continue
                self.at.number = self._csv_line
                if not fields:
                    continue
                if header is None:
                    header = fields
                    repeated = next((name for name in header if header.count(name) > 1), None)
                    if repeated is not None:
                        return self._tally.bad(self.at.source, f"has the column '{repeated}' twice")
                    if not self._needed(header):
                        return
                elif len(fields) != len(header):
                    self._tally.bad(self.at, f"has {len(fields)} fields where the header has {len(header)}")
                else:
                    yield dict(zip(header, fields, strict=True))

    def _decoded_lines(self, file: BinaryIO) -> Iterator[str]:
        """Yield a CSV file's lines; `_csv_line` is set to the first line of a record."""
        for number, line in enumerate(file, 1):
            self._csv_line = self._csv_line or number
            try:
                if b"\0" not in line:
                    yield (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8")
                    continue
                fault = "holds NUL bytes"
            except UnicodeDecodeError:
                fault = "is not UTF-8"
            self._tally.bad(RowLocation(self.at.source, "line", number), fault)

    def _parquet(self) -> Iterator[DataRow]:
        import pyarrow.parquet as pq

        if self.path.suffix.lower() != ".parquet":
            raise DataError(f"'{self.path}' is a compressed Parquet file; decompress it, since it is read in parts")
        with self.path.open("rb") as file:
            fault = signature(file.read(HEAD_BYTES))
        if fault and "Parquet" not in fault:
            return self._tally.bad(self.at.source, fault)
        # Without these, a whole column of a row group is read at once.
        with pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
            if columns := self._needed(parquet.schema_arrow.names):
                for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
                    yield from self._numbered(batch.to_pylist())

    def _arrow(self) -> Iterator[DataRow]:
        import pyarrow as pa

        with open_bytes(self.path) as file:
            head = file.read(HEAD_BYTES)
        if fault := signature(head):
            return self._tally.bad(self.at.source, fault)
        compressed = self.path.suffix.lower() in COMPRESSIONS
        with pa.input_stream(open_bytes(self.path)) if compressed else pa.memory_map(str(self.path)) as source:
            if is_stream := not head.startswith(b"ARROW1"):
                reader = pa.ipc.open_stream(source)
                batches: Iterable[Any] = reader
            else:
                reader = pa.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            columns = self._needed(reader.schema.names)
            for batch in batches if columns else ():
                for start in range(0, len(batch), ROWS_AT_ONCE):
                    yield from self._numbered(batch.select(columns).slice(start, ROWS_AT_ONCE).to_pylist())
            if is_stream and columns and not compressed and source.seek(-8, 2) and source.read() != ARROW_END:
                self._tally.bad(self.at.source, "the file is cut off: its end-of-stream marker is missing")

    def _numbered(self, rows: list[DataRow]) -> Iterator[DataRow]:
        for row in rows:
            self.at.number += 1
            yield row

    def _needed(self, names: list[str]) -> list[str]:
        """Return the columns to read; none if the content is missing, which is reported as damage."""
        needed = self._columns.needed(names)
        if not needed:
            self._tally.bad(self.at.source, self._columns.missing(names), SKIP)
        return needed


def _decode(line: bytes) -> tuple[Any, str | None]:
    """Return a line's JSON value (NaN is allowed) and what is wrong with it, if anything."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return None, f"is not valid JSON: {error.msg} (column {error.colno})"
    except (RecursionError, ValueError) as error:
        return None, _beyond(error)
    return value, None if _is_encodable(value) else _LONE


def _beyond(error: RecursionError | ValueError) -> str:
    """Return what is wrong with JSON that is valid but that Python cannot read."""
    return "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of thousands of digits"


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_kind(value: Any) -> str:
    return {str: "a string", list: "an array", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
