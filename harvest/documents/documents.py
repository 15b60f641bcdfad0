"""Read the documents of a text source, in an order that depends only on the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...shared.core.errors import DataError
from ...shared.core.terminal.logs import adopt_library_logs
from ...shared.core.terminal.progress import library_bars
from ..config import HarvestConfig
from .columns import Columns, encodable
from .columns import Document as Document
from .data_files import LFS, DataFile, damage, open_bytes, read_error, signature
from .find_files import PYTHON_STDLIB, SAVED, SNIFFED_BYTES, TEXT_FILE, FoundFiles, find_files, is_binary
from .tally import RowLocation, Tally


def read_documents(config: HarvestConfig, *, report: bool = False) -> Iterator[Document]:
    """Yield the documents of `config.dataset`; `report` prints what is read and what is left out.

    Raises:
        MissingFileError: the path does not exist.
        ConfigError: a setting does not apply to the source.
        DataError: the source has no usable text, is ambiguous, or is damaged.
    """
    found = find_files(config)
    tally = Tally(config.dataset, config.on_bad_document == "skip", n_found=None if found is None else len(found.files))
    for reason, what in found.left_out if found else ():
        tally.leave_out(reason, what)
    if report:
        tally.print_left_out()
    if found is None:
        documents = _rows(_hub_dataset(config), config, tally)
    elif found.format == TEXT_FILE:
        documents = _texts(found, tally)
    elif found.format == SAVED:
        documents = _rows(_saved_dataset(found, config), config, tally)
    else:
        documents = _data(found, config, tally)
    return _counted(documents, tally, report)


def source_files(config: HarvestConfig) -> list[Path] | None:
    """Return the local files that the documents come from, sorted by path; None for a Hugging Face dataset id."""
    found = find_files(config)
    return None if found is None else sorted(found.files)


def hub_fingerprint(config: HarvestConfig) -> str:
    """Return the hash of a Hugging Face dataset's revision, from the cache if offline.

    Raises `DataError` for a dataset that cannot be reached.
    """
    with _reaching(config):
        builder = _datasets().load_dataset_builder(
            config.dataset, config.dataset_config, revision=config.dataset_revision
        )
    return str(builder.hash)


def _counted(documents: Iterator[Document], tally: Tally, report: bool) -> Iterator[Document]:
    """Yield documents; at their end, or when the consumer stops, print what was read."""
    try:
        for document in documents:
            tally.n_documents += 1
            tally.n_characters += document.n_characters
            tally.n_token_ids += len(document.input_ids or ())
            yield document
    except GeneratorExit:
        if report:
            tally.print_summary()
        raise
    if not tally.n_documents:
        raise tally.nothing()
    if report:
        tally.print_summary()


def _texts(found: FoundFiles, tally: Tally) -> Iterator[Document]:
    """Yield each text file as a document; in a folder, files that are not UTF-8 text are left out."""
    for path in found.files:
        name = encodable(path.relative_to(found.root).as_posix())
        tally.n_files += 1
        head, text = b"", None
        try:
            with open_bytes(path) as file:
                head = file.read(SNIFFED_BYTES)
                content = None if is_binary(head) else head + file.read()
            text = None if content is None else content.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
        except damage() as error:
            tally.bad(str(path), read_error(path, error))
            continue
        if text is None:
            if len(found.files) == 1:
                raise DataError(f"'{path}' {signature(head) or 'is binary, or not in UTF-8; expected UTF-8 text'}")
            tally.leave_out("not UTF-8 text", name)
        elif head.startswith(LFS):
            tally.bad(str(path), str(signature(head)))
        else:
            yield Document(name, text)


def _data(found: FoundFiles, config: HarvestConfig, tally: Tally) -> Iterator[Document]:
    """Yield the rows of data files as documents."""
    columns = Columns(config.text_column, tally)
    for path in found.files:
        tally.n_files += 1
        file = DataFile(path, columns, tally)
        for row in file:
            document = columns.document(row, file.at)
            if document is not None:
                yield document


def _rows(rows: Any, config: HarvestConfig, tally: Tally) -> Iterator[Document]:
    """Yield the rows of a `datasets` dataset as documents."""
    columns = Columns(config.text_column, tally)
    at = RowLocation(config.dataset)
    if rows.column_names:  # None for a stream whose columns are not known in advance
        needed = columns.needed(rows.column_names)
        if not needed:
            raise DataError(f"'{config.dataset}' {columns.missing(rows.column_names)}")
        rows = rows.select_columns(needed)
    with _reading(at):
        for at.number, row in enumerate(rows):
            document = columns.document(row, at)
            if document is not None:
                yield document
    tally.n_files = tally.n_found or 0


def _datasets() -> Any:
    """Import `datasets` lazily: it takes about a second and plain text does not need it."""
    import datasets

    adopt_library_logs()
    return datasets


def _saved_dataset(found: FoundFiles, config: HarvestConfig) -> Any:
    with _reaching(config):
        return _datasets().load_from_disk(str(found.root))


def _hub_dataset(config: HarvestConfig) -> Any:
    files = {} if config.files is None else {"data_files": {config.split: config.files}}
    with _reaching(config):
        return _datasets().load_dataset(
            config.dataset,
            config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
            streaming=config.streaming,
            **files,
        )


@contextmanager
def _reaching(config: HarvestConfig) -> Iterator[None]:
    try:
        with library_bars():
            yield
    except (OSError, ValueError, LookupError, RuntimeError, TypeError) as error:
        raise DataError(
            f"cannot load dataset '{config.dataset}': expected {PYTHON_STDLIB}, a file, a folder, or a Hugging Face "
            f"dataset id that can be reached; {_reason(error)}"
        ) from None


@contextmanager
def _reading(at: RowLocation) -> Iterator[None]:
    """Turn the exceptions of a stream of rows into `DataError`."""
    try:
        yield
    except DataError:
        raise
    except (*damage(), LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{at}: the dataset cannot be read beyond here; {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
