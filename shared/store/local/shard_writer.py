"""Write one shard: a file per array under temporary names, and the statistics and provenance beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format.checksum import crc32c
from ..format.footer import CHECKSUM_BYTES, encode_footer
from ..format.layout import Header, arrays_of, provenance_key, statistics_key
from ..format.manifest import FileRecord, ShardRecord
from ..format.provenance import Segments, encode_segments, join_segments
from ..format.statistics import Statistics, encode_statistics
from .durable import announce, close, make_folder, stage, sync, temporary_name

EncodedChunks = list[tuple[str, Any]]
"""The stored bytes of one chunk of each of some arrays, by array."""


class ShardFile:
    """The file of one array, written chunk after chunk under a temporary name."""

    def __init__(self, path: Path, n_chunks: int) -> None:
        self.path = path
        self.n_chunks = n_chunks
        self.sizes: list[int] = []
        self.checksums: list[int] = []
        announce(f"create {path.name}")
        self._file = path.open("wb")

    def append(self, stored: Any) -> None:
        """Write the next chunk and its checksum."""
        checksum = crc32c(stored)
        announce(f"write {self.path.name}")
        self._file.write(stored)
        self._file.write(checksum.to_bytes(CHECKSUM_BYTES, "little"))
        self.sizes.append(len(stored) + CHECKSUM_BYTES)
        self.checksums.append(checksum)

    def finish(self) -> tuple[int, int]:
        """Write the footer, flush to disk, and return the file's (bytes, footer checksum)."""
        footer = encode_footer(self.sizes, self.checksums, self.n_chunks)
        self._file.write(footer)
        sync(self._file)
        self._file.close()
        return sum(self.sizes) + len(footer), crc32c(footer)

    def abandon(self) -> None:
        """Close the unfinished file; it is removed with the folder of temporary files."""
        close(self._file)


class ShardInProgress:
    """The temporary files of a shard that is being written."""

    def __init__(self, number: int, folder: Path, n_chunks: dict[str, int]) -> None:
        self.number = number
        self._paths = {name: folder / f"{temporary_name(name)}.{number}" for name in n_chunks}
        self._n_chunks = n_chunks
        self._files: dict[str, ShardFile] = {}

    def append(self, encoded: EncodedChunks) -> int:
        """Write the next chunk of each array; return the bytes written."""
        written = 0
        for name, stored in encoded:
            if name not in self._files:
                make_folder(self._paths[name].parent)
                self._files[name] = ShardFile(self._paths[name], self._n_chunks[name])
            self._files[name].append(stored)
            written += len(stored)
        return written

    def finish(self) -> dict[str, tuple[Path, int, int]]:
        """Flush the files; return each array's (temporary path, bytes, footer checksum)."""
        return {name: (file.path, *file.finish()) for name, file in self._files.items()}

    def abandon(self) -> None:
        """Close the unfinished files."""
        for file in self._files.values():
            file.abandon()


@dataclass(frozen=True)
class WrittenShard:
    """A shard whose arrays are written, and the content of its side files: `info` has documents' hashes and names."""

    arrays: ShardInProgress
    n_contexts: int
    statistics: Statistics
    segments: list[Segments]
    info: Mapping[int, tuple[int, str]]

    def finish(self, header: Header, partial: Path) -> tuple[dict[str, Path], ShardRecord]:
        """Flush the arrays and write the side files to `partial`.

        Returns the temporary path of each file, by its path in the store, and the shard's record for the manifest.
        """
        number = self.arrays.number
        keys = {array.name: array.shard_key(number) for array in arrays_of(header)}
        written, files = {}, {}
        for name, (path, n_bytes, checksum) in self.arrays.finish().items():
            written[keys[name]] = path
            files[keys[name]] = FileRecord(n_bytes, checksum)
        sides = {
            statistics_key(number): encode_statistics(self.statistics),
            provenance_key(number): encode_segments(join_segments(self.segments), self.info),
        }
        for key, content in sides.items():
            written[key] = stage(partial, key, content)
            files[key] = FileRecord.of(content)
        return written, ShardRecord(shard=number, contexts=self.n_contexts, files=files)
