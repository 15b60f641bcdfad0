"""The web application: endpoints as JSON or server-sent events, their description, and the page's files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ....shared.core.errors import MissingFileError, ThresherError
from ...results.output import finite
from ..model.worker import Job, QueueFullError
from . import endpoints, model_endpoints
from .assets import page_files
from .endpoint import Endpoint
from .messages import (
    ActivationsRequest,
    AttributionRequest,
    ContrastRequest,
    CurveRequest,
    GraphRequest,
    LatentsQuery,
    NoteRequest,
    NotesQuery,
    SearchQuery,
    SteerRequest,
    from_body,
    from_query,
)
from .openapi import description_page, openapi
from .security import Access, Guard
from .services import Services

ENDPOINTS = (
    Endpoint("GET", "/api/run", endpoints.describe_run),
    Endpoint("GET", "/api/status", endpoints.read_status),
    Endpoint("GET", "/api/saes", endpoints.list_saes),
    Endpoint("GET", "/api/saes/{name:path}/latents/{latent:int}", endpoints.describe_latent),
    Endpoint("GET", "/api/saes/{name:path}/latents/{latent:int}/matches", endpoints.match_latent),
    Endpoint("GET", "/api/saes/{name:path}/latents/{latent:int}/strength", endpoints.suggest_strength),
    Endpoint("GET", "/api/saes/{name:path}/latents", endpoints.list_latents, LatentsQuery),
    Endpoint("GET", "/api/saes/{name:path}", endpoints.describe_one_sae),
    Endpoint("GET", "/api/search", endpoints.search_latents, SearchQuery),
    Endpoint("GET", "/api/notes", endpoints.read_notes, NotesQuery),
    Endpoint("PUT", "/api/notes", endpoints.write_note, body=NoteRequest),
    Endpoint("POST", "/api/activations", model_endpoints.answer_activations, body=ActivationsRequest, runs_model=True),
    Endpoint("POST", "/api/contrast", model_endpoints.answer_contrast, body=ContrastRequest, runs_model=True),
    Endpoint("POST", "/api/attribution", model_endpoints.answer_attribution, body=AttributionRequest, runs_model=True),
    Endpoint("POST", "/api/graph", model_endpoints.answer_graph, body=GraphRequest, runs_model=True),
    Endpoint("POST", "/api/steer", model_endpoints.answer_steer, body=SteerRequest, runs_model=True, streams=True),
    Endpoint(
        "POST", "/api/steer/curve", model_endpoints.answer_curve, body=CurveRequest, runs_model=True, streams=True
    ),
)


def application(services: Services, access: Access) -> Guard:
    """Return the ASGI application of a run."""
    description = openapi(ENDPOINTS)
    routes = [Route(each.path, _handler(each, services), methods=[each.method]) for each in ENDPOINTS]
    routes.insert(0, Route("/api/openapi.json", _constant(msgspec.json.encode(description), "application/json")))
    routes.insert(0, Route("/api", _constant(description_page(description), "text/html; charset=utf-8")))
    for path, (content, kind) in page_files().items():
        routes.append(Route(path, _constant(content, kind)))
    handlers: dict[Any, Any] = {404: _not_found, 405: _not_found}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), access)


def _constant(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return Response(content, headers={"content-type": kind})

    return answer


async def _not_found(_: Request, error: Any) -> Response:
    return _error(error.status_code, "there is nothing at this address; /api lists what there is")


def _handler(endpoint: Endpoint, services: Services) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            query = from_query(endpoint.query, request.query_params)
            given = [] if endpoint.body is None else [from_body(endpoint.body, await request.body())]
            if endpoint.runs_model:
                return await _run(endpoint, endpoint.answer(services, *given))
            found = await run_in_threadpool(endpoint.answer, services, query, *given, **request.path_params)
        except ThresherError as error:
            return _failure(error)
        return found if isinstance(found, Response) else _json(found)

    return answer


async def _run(endpoint: Endpoint, job: Job) -> Response:
    if endpoint.streams:
        return StreamingResponse(_sent(job), media_type="text/event-stream", headers={"x-accel-buffering": "no"})
    async for event in job.events():
        if event["event"] == "error":
            return _error(422, event["error"])
    return _json(job.result)


async def _sent(job: Job) -> AsyncIterator[bytes]:
    async for event in job.events():
        kind, content = event["event"], {key: value for key, value in event.items() if key != "event"}
        yield b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(finite(content)) + b"\n\n"


def _failure(error: ThresherError) -> Response:
    status = 404 if isinstance(error, MissingFileError) else 503 if isinstance(error, QueueFullError) else 422
    return _error(status, " ".join(str(error).split()))


def _error(status: int, reason: str) -> Response:
    return _json({"error": reason}, status)


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(finite(content)), status, media_type="application/json")
