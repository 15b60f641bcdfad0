"""The endpoints that read: the run, its SAEs and latents, the search, and notes."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ....shared.core.errors import MissingFileError
from ...report.labels import point_labels
from ...report.write import overview_data
from ..data.latents import LatentTables
from .messages import LatentsQuery, NoQuery, NoteRequest, NotesQuery, SearchQuery
from .services import Services


def describe_run(services: Services, _: NoQuery) -> dict[str, Any]:
    """Return the run's name, its sweep's metrics and curves as the report shows them, and the limits of requests."""
    run, config = services.run, services.config
    limits = {key: getattr(config, key) for key in ("max_tokens", "max_new_tokens", "max_samples", "max_seconds")}
    row = run.metrics[0] if run.metrics else {}
    return {
        "run": run.folder.parent.name if run.folder.name == "evaluation" else run.folder.name,
        "model": run.model.name,
        "dataset": row.get("dataset"),
        "store": row.get("store"),
        "thresher_version": row.get("thresher_version"),
        "limits": limits,
        "transcoders": run.transcoders,
        **overview_data(run.metrics, run.loss_curves()),
    }


def list_saes(services: Services, _: NoQuery) -> dict[str, Any]:
    """Return the SAEs of the run with their metrics."""
    run = services.run
    rows = [run.row(name) for name in run.indexes]
    labels = point_labels([row | {"name": name} for name, row in zip(run.indexes, rows, strict=True)])
    return {"saes": [_sae(services, name) | {"label": label} for name, label in zip(run.indexes, labels, strict=True)]}


def describe_one_sae(services: Services, _: NoQuery, name: str) -> dict[str, Any]:
    """Return one SAE with its metrics."""
    services.tables.index(name)
    return _sae(services, name)


def _sae(services: Services, name: str) -> dict[str, Any]:
    index, row = services.tables.index(name), services.run.row(name)
    return {
        "name": name,
        "n_latents": index.n_latents,
        "n_rows": index.metadata.get("n_rows"),
        "hook_point": index.metadata.get("hook_point"),
        "has_weights": name in services.run.saes,
        "checkpoints": [
            {"name": one.name, "step": one.step, "tokens": one.tokens}
            for one in services.shelf.checkpoints.values()
            if one.sae == name
        ],
        "metrics": {key: value for key, value in row.items() if isinstance(value, (int, float, str)) and key != "name"},
        "density_histogram": row.get("density_histogram"),
    }


def list_latents(services: Services, query: LatentsQuery, name: str) -> dict[str, Any]:
    """Return a page of an SAE's latents: sorted, and filtered by number, density, tokens, stars or a list."""
    only = None if query.numbers is None else [int(number) for number in query.numbers.split(",")]
    if query.starred or query.list:
        notes = services.notes.all(name)
        chosen = [note for note in notes if note["starred"] or not query.starred]
        noted = [note["latent"] for note in chosen if not query.list or query.list in note["lists"]]
        only = [latent for latent in noted if only is None or latent in only]
    page = services.tables.page(
        name,
        sort=query.sort,
        ascending=query.ascending,
        limit=query.limit,
        offset=query.offset,
        alive=query.alive,
        min_density=query.min_density,
        max_density=query.max_density,
        promotes=query.promotes,
        suppresses=query.suppresses,
        peaks=query.peaks,
        only=only,
    )
    return page | {"latents": _with_labels(services, name, page["latents"])}


def _with_labels(services: Services, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    notes = {note["latent"]: note for note in services.notes.all(name)}
    return [
        row | {"label": note["label"] or None, "starred": note["starred"]}
        if (note := notes.get(row["latent"])) is not None
        else row | {"label": None, "starred": False}
        for row in rows
    ]


def describe_latent(services: Services, _: NoQuery, name: str, latent: int) -> dict[str, Any]:
    """Return all that is known of a latent."""
    found = services.tables.latent(name, latent)
    note = services.notes.get(name, latent)
    return found | {"note": note and note | {"fits": _fits(services.tables, note)}}


def match_latent(services: Services, _: NoQuery, name: str, latent: int) -> dict[str, Any]:
    """Return the latents of other SAEs of the run whose decoder directions are closest to this latent's."""
    services.check_latent(name, latent)
    if name not in services.run.saes:
        raise MissingFileError(f"the weights of the SAE '{name}' are no longer where they were evaluated")
    matches = services.shelf.matches(name, latent)
    for match in matches:
        some = services.tables.some(match["sae"], [row["latent"] for row in match["latents"]])
        match["latents"] = [row | some[row["latent"]] for row in match["latents"]]
    return {"sae": name, "latent": latent, "matches": matches}


def suggest_strength(services: Services, _: NoQuery, name: str, latent: int) -> dict[str, Any]:
    """Return a strength to begin steering a latent with, and how long the vector that it adds is."""
    services.check_latent(name, latent)
    return {"sae": name, "latent": latent} | services.strengths.of(name, latent)


def search_latents(services: Services, query: SearchQuery) -> dict[str, Any]:
    """Search explanations, tokens and contexts by words and by meaning; both rankings are fused."""
    found = services.search.search(query.q, None if query.sae is None else [query.sae], query.limit)
    notes = {(note["sae"], note["latent"]): note["label"] or None for note in services.notes.all()}
    for row in found["results"]:
        row["label"] = notes.get((row["sae"], row["latent"]))
    wanted = query.q.strip().casefold()
    noted = [
        note
        for note in services.notes.all(query.sae)
        if wanted and wanted in f"{note['label']}\n{note['comment']}\n{' '.join(note['lists'])}".casefold()
    ]
    return found | {"notes": noted[: query.limit]}


def read_notes(services: Services, query: NotesQuery) -> dict[str, Any] | Response:
    """Return the notes as JSON, or all of them as a Parquet file."""
    if query.format == "parquet":
        headers = {"content-disposition": 'attachment; filename="notes.parquet"'}
        return Response(services.notes.parquet(), media_type="application/vnd.apache.parquet", headers=headers)
    notes = services.notes.all(query.sae)
    return {"notes": [note | {"fits": _fits(services.tables, note)} for note in notes]}


def write_note(services: Services, _: NoQuery, request: NoteRequest) -> dict[str, Any]:
    """Write a latent's note and return it; an empty one removes it."""
    services.check_latent(request.sae, request.latent)
    note = services.notes.put(
        request.sae,
        request.latent,
        label=request.label,
        comment=request.comment,
        starred=request.starred,
        lists=request.lists,
        fingerprint=services.tables.index(request.sae).metadata.get("fingerprint"),
    )
    return {"note": note and note | {"fits": True}}


def _fits(tables: LatentTables, note: dict[str, Any]) -> bool:
    """Return whether a note was made on the index that is shown."""
    index = tables.run.indexes.get(note["sae"])
    return index is not None and index.metadata.get("fingerprint") == note["fingerprint"]


def read_status(services: Services, _: NoQuery) -> dict[str, Any]:
    """Return the state of the model, with how many requests wait, and how far the search is prepared."""
    return services.status()
