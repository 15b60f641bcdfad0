"""What the endpoints use: the run, its tables, the search, the model's worker and the notes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....shared.core.compute.device import choose_device
from ....shared.core.errors import ConfigError, MissingFileError
from ...explain.notes import Notes, notes_path
from ..config import MicroscopeConfig
from ..data.checkpoints import find_checkpoints
from ..data.latents import LatentTables
from ..data.run_folder import OpenRun, open_run
from ..data.saes import SaeShelf
from ..data.strength import UsualStrengths
from ..model.loaded import LoadedModel
from ..model.worker import ModelWorker
from ..search.embeddings_server import EmbeddingsServer
from ..search.encoder import SentenceEncoder, TextEncoder, packaged_encoder
from ..search.prepare import Preparation
from ..search.search import LatentSearch

CACHE_NAME = "microscope"


@dataclass(frozen=True)
class Services:
    """One of each, for all requests."""

    config: MicroscopeConfig
    run: OpenRun
    tables: LatentTables
    shelf: SaeShelf
    worker: ModelWorker[LoadedModel]
    preparation: Preparation
    search: LatentSearch
    notes: Notes
    strengths: UsualStrengths

    @classmethod
    def open(cls, config: MicroscopeConfig) -> Services:
        """Open a run; the model and the search start to load in the background with `start`.

        Raises:
            MissingFileError, ConfigError, DataError: those of `open_run`.
        """
        run = open_run(config.run, config.model)
        cache = _cache_folder(run.folder)
        tables, shelf = LatentTables(run, cache), SaeShelf(run.saes, find_checkpoints(run.saes))

        def load() -> LoadedModel:
            return LoadedModel.open(
                run.model,
                shelf,
                tables.maxima,
                device=choose_device(config.device),
                max_tokens=config.max_tokens,
                trust_remote_code=config.trust_remote_code,
                eager=bool(run.transcoders),
            )

        def open_encoder() -> TextEncoder | None:
            if config.embeddings_url is not None:
                return EmbeddingsServer(config.embeddings_url, str(config.encoder))
            name = packaged_encoder() if config.encoder in (None, True) else config.encoder
            return SentenceEncoder(name) if name else None

        worker: ModelWorker[LoadedModel] = ModelWorker(load, config.max_seconds, config.max_waiting)
        preparation = Preparation(tables, cache, open_encoder, config.embedded_latents, lambda: worker.busy)
        search = LatentSearch(tables, preparation)
        notes, strengths = Notes(notes_path(run.folder)), UsualStrengths(tables, shelf)
        return cls(config, run, tables, shelf, worker, preparation, search, notes, strengths)

    def start(self) -> None:
        """Start to load the model and to prepare the search."""
        self.worker.start()
        self.preparation.start()

    def stop(self) -> None:
        """Let the threads end."""
        self.worker.stop()
        self.preparation.stop()

    def names(self, given: Sequence[str] | None, *, checkpoints: bool = False) -> list[str]:
        """Return the SAEs that a request names, or all whose weights are there; with `checkpoints`, it may name some.

        Raises:
            MissingFileError: there is no such SAE, or none has weights.
        """
        for name in given or ():
            if not checkpoints or name not in self.shelf.checkpoints:
                self.tables.index(name)
        found = list(given or (name for name in self.run.indexes if name in self.run.saes))
        if not found:
            raise MissingFileError("the weights of this run's SAEs are no longer where they were evaluated")
        return list(dict.fromkeys(found))

    def one_per_hook_point(self) -> list[str]:
        """Return the first SAE with weights at each hook point; raise `MissingFileError` if there is none."""
        first: dict[Any, str] = {}
        for name in self.names(None):
            first.setdefault(self.tables.index(name).metadata.get("hook_point"), name)
        return list(first.values())

    def described(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return an answer with what lists show of each of the `latents` in it."""
        for name in dict.fromkeys(row["sae"] for row in found["latents"]):
            rows = [row for row in found["latents"] if row["sae"] == name]
            some = self.tables.some(name, [row["latent"] for row in rows])
            for row in rows:
                row |= {key: value for key, value in some[row["latent"]].items() if key not in row}
        return found

    def check_latent(self, name: str, latent: int) -> None:
        """Raise an error if there is no such latent."""
        n = self.tables.index(name).n_latents
        if not 0 <= latent < n:
            raise ConfigError(f"expected a latent from 0 to {n - 1} of '{name}', got {latent}")

    def status(self) -> dict[str, Any]:
        """Return what the page says of the model and the search."""
        state, lm = self.preparation.state, self.worker.model
        search = {"words": state.words, "meaning": state.meaning, "encoder": state.encoder, "note": state.note}
        model = self.worker.status() | {"name": self.run.model.name, "chats": None if lm is None else lm.chats}
        return {"model": model, "search": search}


def _cache_folder(evaluation: Path) -> Path:
    """Return the folder of what the search prepares: beside the evaluation, or a temporary one if that is read-only."""
    folder = evaluation / CACHE_NAME
    try:
        folder.mkdir(exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="thresher-microscope-"))
    return folder
