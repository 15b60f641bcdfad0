"""Prepare the search in the background: short tables and words first, which take seconds, then embeddings.

What is prepared lies in files beside the evaluation and is made again if the index or its explanations change.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ....shared.core.disk import replacing
from ....shared.core.errors import ThresherError
from ...explain.table import explanations_path
from ..data.latents import LatentTables
from .encoder import TextEncoder
from .full_text import words_key, write_words
from .latent_texts import LatentText, latent_texts
from .vectors import LatentVectors, read_vectors, write_vectors

_log = logging.getLogger(__name__)
WORDS_VERSION, VECTORS_VERSION = 3, 1
"""Each increased whenever the same index gives other files of its kind."""
EMBEDDED_AT_ONCE = 64


@dataclass
class SearchState:
    """How far the search is prepared, for the page: `words` and `meaning` are shares of all SAEs."""

    words: float = 0.0
    meaning: float = 0.0
    encoder: str | None = None
    note: str = ""
    ready: dict[str, Path] = field(default_factory=dict)
    vectors: dict[str, LatentVectors] = field(default_factory=dict)


class Preparation(threading.Thread):
    """The thread that prepares. `busy` says when the model works, which goes first."""

    def __init__(
        self,
        tables: LatentTables,
        cache: Path,
        open_encoder: Callable[[], TextEncoder | None],
        embedded_latents: int,
        busy: Callable[[], bool],
    ):
        super().__init__(name="prepare the search", daemon=True)
        self.state = SearchState()
        self.encoder: TextEncoder | None = None
        self._tables, self._cache, self._open_encoder = tables, cache, open_encoder
        self._embedded_latents, self._busy = embedded_latents, busy
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Stop after the current batch; files are only ever written whole."""
        self._stopped.set()

    def run(self) -> None:
        names = list(self._tables.run.indexes)
        try:
            for number, name in enumerate(names):
                self._prepare_words(name)
                self.state.words = (number + 1) / len(names)
            self.encoder = self._open_encoder()
            if self.encoder is None:
                self.state.note = self.state.note or "no sentence encoder: words are searched, not meaning"
                return
            self.state.encoder = self.encoder.name
            for number, name in enumerate(names):
                self._prepare_vectors(name, self.encoder, (number, len(names)))
                self.state.meaning = (number + 1) / len(names)
        except _Stopped:
            return
        except (ThresherError, OSError) as error:
            self.state.note = " ".join(str(error).split())
        except Exception as error:  # a library's: browsing goes on
            if self._stopped.is_set():  # at the end of the process, no library can load anything
                return
            _log.exception("the search cannot be prepared")
            self.state.note = f"the search cannot be prepared: {type(error).__name__}: {error}"

    def _path(self, name: str, suffix: str) -> Path:
        return self._cache / f"{self._tables.index(name).path.stem}.{suffix}"

    def _key(self, name: str, version: int, *more: Any) -> str:
        """Return what the files of an SAE are made from."""
        index = self._tables.index(name)
        explained = explanations_path(index)
        facts = [version, index.metadata.get("fingerprint"), index.path.stat().st_mtime_ns, *more]
        facts.append(explained.stat().st_mtime_ns if explained.is_file() else None)
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def _prepare_words(self, name: str) -> None:
        path, key = self._path(name, "words.sqlite"), self._key(name, WORDS_VERSION)
        if words_key(path) != key or not self._tables.short_path(name).is_file():
            with replacing(self._tables.short_path(name)) as unfinished:
                self._tables.write_short(name, unfinished)
            write_words(path, self._unless_stopped(name), key)
        self.state.ready[name] = path

    def _unless_stopped(self, name: str) -> Any:
        for text in latent_texts(self._tables, name):
            if self._stopped.is_set():
                raise _Stopped
            yield text

    def _prepare_vectors(self, name: str, encoder: TextEncoder, place: tuple[int, int]) -> None:
        path = self._path(name, "vectors.safetensors")
        key = self._key(name, VECTORS_VERSION, encoder.name, encoder.size, self._embedded_latents)
        found = read_vectors(path, key)
        if found is None:
            chosen = self._most_interesting(name)
            texts = [text for text in self._unless_stopped(name) if chosen is None or text.latent in chosen]
            found = self._embed(texts, encoder, place)
            write_vectors(path, found, key)
            found = read_vectors(path, key) or found
        self.state.vectors[name] = found

    def _most_interesting(self, name: str) -> set[int] | None:
        """Return the latents to embed; None if these are all."""
        if self._tables.index(name).n_latents <= self._embedded_latents:
            return None
        page = self._tables.page(name, limit=self._embedded_latents, numbers_only=True)
        self.state.note = f"the {self._embedded_latents:,} most interesting latents of an SAE are searched by meaning"
        return {row["latent"] for row in page["latents"]}

    def _embed(self, texts: list[LatentText], encoder: TextEncoder, place: tuple[int, int]) -> LatentVectors:
        texts = sorted(texts, key=lambda text: len(text.for_meaning))
        vectors = torch.empty(len(texts), encoder.size, dtype=torch.float16)
        for start in range(0, len(texts), EMBEDDED_AT_ONCE):
            while self._busy() and not self._stopped.is_set():
                time.sleep(0.05)
            if self._stopped.is_set():
                raise _Stopped
            some = texts[start : start + EMBEDDED_AT_ONCE]
            vectors[start : start + len(some)] = encoder.embed([text.for_meaning for text in some]).half()
            self.state.meaning = (place[0] + (start + len(some)) / len(texts)) / place[1]
        return LatentVectors(torch.tensor([text.latent for text in texts], dtype=torch.int64), vectors)


class _Stopped(Exception):
    """The server ends."""
