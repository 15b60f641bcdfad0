"""Read latents from the feature indexes: one with all that is known of it, or a page of those that a filter chooses.

DuckDB reads the Parquet files in place. Once the search has prepared an SAE, its short table of latents is read
instead of the index, whose nested columns take longer.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.errors import ConfigError, MissingFileError
from ...explain.table import are_of_index, explanations_path
from ...features.files import FeatureIndex
from ...report.definitions import significant
from .run_folder import OpenRun

SHOWN_PEAKS, SHOWN_PROMOTED, SHOWN_NEIGHBOURS = 4, 4, 8
SHORT_ROW_GROUP = 2048
SORTS = ("interestingness", "density", "max_activation", "latent")
SortKey = Literal["interestingness", "density", "max_activation", "latent"]
SHORT_TABLE = """
    SELECT latent, firings, density, mean_activation, max_activation, interestingness,
           list_transform("top", lambda entry: entry.tokens[entry.peak + 1]) AS peaks,
           list_transform(promoted, lambda effect: effect.token) AS promoted,
           list_transform(suppressed, lambda effect: effect.token) AS suppressed
    FROM read_parquet(?)
"""
"""What lists of latents show, from an index."""


class LatentTables:
    """The latents of a run's SAEs. Methods may be called from several threads."""

    def __init__(self, run: OpenRun, cache: Path):
        self.run, self._cache = run, cache
        self._local, self._lock = threading.local(), threading.Lock()
        self._maxima: dict[str, Float[Tensor, " d_sae"]] = {}
        self._db = duckdb.connect(":memory:", config={"threads": "2", "autoinstall_known_extensions": "false"})
        folders = [str(folder.absolute()).replace("'", "''") for folder in (run.folder, cache)]
        listed = ", ".join(f"'{folder}'" for folder in folders)
        self._db.execute(f"SET allowed_directories = [{listed}]")
        self._db.execute("SET enable_external_access = false")
        self._db.execute("SET lock_configuration = true")

    def index(self, name: str) -> FeatureIndex:
        """Return an SAE's index, or raise `MissingFileError` with the names that there are."""
        if name not in self.run.indexes:
            raise MissingFileError(f"no SAE '{name}'; this run has: {', '.join(self.run.indexes)}")
        return self.run.indexes[name]

    def short_path(self, name: str) -> Path:
        """Return where the search puts an SAE's short table of latents."""
        return self._cache / f"{self.index(name).path.stem}.latents.parquet"

    def write_short(self, name: str, path: Path) -> None:
        """Write an SAE's short table of latents."""
        with self._db.cursor() as db:
            target = str(path.absolute()).replace("'", "''")
            source = [str(self.index(name).path.absolute())]
            db.execute(f"COPY ({SHORT_TABLE}) TO '{target}' (FORMAT parquet, ROW_GROUP_SIZE {SHORT_ROW_GROUP})", source)

    def rows(self, sql: str, parameters: Sequence[Any]) -> list[dict[str, Any]]:
        """Run a query of this module or of the search, and return its rows; values only come as parameters."""
        with self._db.cursor() as db:
            found = db.execute(sql, list(parameters))
            names = [column[0] for column in found.description or ()]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def _short(self, name: str) -> tuple[str, list[Any]]:
        path = self.short_path(name)
        if path.is_file():
            return "SELECT * FROM read_parquet(?)", [str(path.absolute())]
        return SHORT_TABLE, [str(self.index(name).path.absolute())]

    def some(self, name: str, latents: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Return what lists show of some latents of an SAE, by number."""
        wanted = sorted(set(latents))
        if not wanted:
            return {}
        table, parameters = self._short(name)
        places = ", ".join("?" * len(wanted))
        rows = self.rows(f"SELECT * FROM ({table}) WHERE latent IN ({places})", [*parameters, *wanted])
        said = self.explanations(name, wanted)
        return {row["latent"]: self._listed(name, row, said.get(row["latent"], [])) for row in rows}

    def page(
        self,
        name: str,
        *,
        sort: SortKey = "interestingness",
        ascending: bool = False,
        limit: int = 80,
        offset: int = 0,
        alive: bool = True,
        min_density: float | None = None,
        max_density: float | None = None,
        promotes: str | None = None,
        suppresses: str | None = None,
        peaks: str | None = None,
        only: Sequence[int] | None = None,
        numbers_only: bool = False,
    ) -> dict[str, Any]:
        """Return one page of the latents that fulfil all conditions, and how many there are.

        `promotes`, `suppresses` and `peaks` are texts of a token; one with other spaces or case counts if no token is
        exactly that text.

        Raises:
            MissingFileError: there is no such SAE.
            ConfigError: the order is not known.
        """
        if sort not in SORTS:
            raise ConfigError(f"sort is '{sort}'; expected one of: {', '.join(SORTS)}")
        table, parameters = self._short(name)
        conditions = ["firings > 0"] if alive else []
        for column, bound, relation in (("density", min_density, ">="), ("density", max_density, "<=")):
            if bound is not None:
                conditions.append(f"{column} {relation} ?")
                parameters.append(bound)
        for column, text in (("promoted", promotes), ("suppressed", suppresses), ("peaks", peaks)):
            if text:
                ids = token_ids(self.index(name), text)
                conditions.append(" OR ".join(f"list_contains({column}, ?)" for _ in ids) or "false")
                parameters += ids
        if only is not None:
            conditions.append("list_contains(?::BIGINT[], latent)")
            parameters.append(list(only))
        where = " AND ".join(f"({condition})" for condition in conditions) or "true"
        order = f"key {'ASC' if ascending else 'DESC'}, latent"
        sql = f"""
            WITH chosen AS MATERIALIZED (SELECT latent, {sort} AS key FROM ({table}) WHERE {where}),
                 part AS (SELECT * FROM chosen ORDER BY {order} LIMIT ? OFFSET ?)
            SELECT (SELECT count(*) FROM chosen) AS total, (SELECT list(latent ORDER BY {order}) FROM part) AS latents
        """
        (found,) = self.rows(sql, [*parameters, limit, offset])
        numbers, total = found["latents"] or [], found["total"]
        if numbers_only:
            return {"sae": name, "total": total, "latents": [{"latent": number} for number in numbers]}
        listed = self.some(name, numbers)
        return {"sae": name, "total": total, "latents": [listed[number] for number in numbers]}

    def _listed(self, name: str, row: Mapping[str, Any], said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        texts = self.index(name).texts
        peaks = [token for token, _ in Counter(row["peaks"]).most_common(SHOWN_PEAKS)]
        plain = [line["explanation"] for line in said if not line["is_baseline"]]
        return {
            "latent": row["latent"],
            "firings": row["firings"],
            "density": significant(row["density"]),
            "max_activation": significant(row["max_activation"]),
            "interestingness": significant(row["interestingness"]),
            "peaks": [texts.alone(token) for token in peaks],
            "promoted": [texts.alone(token) for token in row["promoted"][:SHOWN_PROMOTED]],
            "explanation": plain[0] if plain else None,
        }

    def explanations(self, name: str, latents: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """Return the explanations of some latents; none if they were made for another index."""
        index = self.index(name)
        if not are_of_index(index):
            return {}
        sql = "SELECT * FROM read_parquet(?) WHERE list_contains(?::BIGINT[], latent)"
        rows = self.rows(sql, [str(explanations_path(index).absolute()), list(latents)])
        found: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(row["latent"], []).append(
                {key: significant(value) if isinstance(value, float) else value for key, value in row.items()}
            )
        return found

    def maxima(self, name: str) -> Float[Tensor, " d_sae"]:
        """Return the largest activation of each latent of an SAE."""
        with self._lock:
            if name not in self._maxima:
                column = self.index(name).columns(["max_activation"])["max_activation"]
                self._maxima[name] = torch.from_numpy(column.to_numpy().copy())
            return self._maxima[name]

    def latent(self, name: str, number: int) -> dict[str, Any]:
        """Return all that is known of a latent, with texts in place of token ids beside them.

        Raises:
            MissingFileError: there is no such SAE.
            ConfigError: the SAE has no such latent.
        """
        index = self.index(name)
        row = self._row(index, number)
        nearest = self._decoder_neighbours(name, number)
        others = self.some(name, [*(other["latent"] for other in row["neighbours"]), *(other for other, _ in nearest)])
        return {
            "sae": name,
            "latent": number,
            "n_latents": index.n_latents,
            "hook_point": index.metadata.get("hook_point"),
            **{key: row[key] for key in ("firings", "histogram")},
            **{key: significant(row[key]) for key in ("density", "mean_activation", "max_activation")},
            "interestingness": significant(row["interestingness"]),
            "histogram_end": significant(row["histogram_end"]),
            "top": [_context(index, entry) for entry in row["top"]],
            "sampled": [_context(index, entry) for entry in row["sampled"]],
            "promoted": [_effect(index, effect) for effect in row["promoted"]],
            "suppressed": [_effect(index, effect) for effect in row["suppressed"]],
            "neighbours": [
                {"score": significant(other["score"])} | others[other["latent"]] for other in row["neighbours"]
            ],
            "decoder_neighbours": [{"cosine": significant(cosine)} | others[other] for other, cosine in nearest],
            "explanations": self.explanations(name, [number]).get(number, []),
        }

    def _row(self, index: FeatureIndex, number: int) -> dict[str, Any]:
        if index.name not in self._local.__dict__:  # a Parquet file is read by one thread at a time
            setattr(self._local, index.name, FeatureIndex.open(index.path))
        return getattr(self._local, index.name).latent(number)

    def _decoder_neighbours(self, name: str, number: int) -> list[tuple[int, float]]:
        path = self.run.latents_file(name)
        if not path.is_file() or "neighbour_cosines" not in pq.read_schema(path).names:
            return []
        sql = "SELECT neighbours, neighbour_cosines FROM read_parquet(?) WHERE latent = ?"
        for row in self.rows(sql, [str(path.absolute()), number]):
            return list(zip(row["neighbours"], row["neighbour_cosines"], strict=True))[:SHOWN_NEIGHBOURS]
        return []


def token_ids(index: FeatureIndex, text: str) -> list[int]:
    """Return the ids of the tokens with this text, or else of those that differ in spaces and case only."""
    exact = [token for token, known in index.vocabulary.items() if known == text]
    folded = text.strip().casefold()
    return exact or [token for token, known in index.vocabulary.items() if known.strip().casefold() == folded]


def _context(index: FeatureIndex, entry: Mapping[str, Any]) -> dict[str, Any]:
    document = entry["document"]
    return {
        "activation": significant(entry["activation"]),
        "peak": entry["peak"],
        "tokens": entry["tokens"],
        "texts": index.texts.in_context(entry["tokens"]),
        "activations": [significant(value, 4) for value in entry["activations"]],
        "context": entry["context"],
        "document": document,
        "position": entry["position"],
        "source": index.documents.get(document),
    }


def _effect(index: FeatureIndex, effect: Mapping[str, Any]) -> dict[str, Any]:
    token = effect["token"]
    return {"token": token, "text": index.texts.alone(token), "effect": significant(effect["effect"])}
