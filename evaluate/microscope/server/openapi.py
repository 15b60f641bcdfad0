"""The description of the endpoints: OpenAPI 3.1, made of the types of their requests, and a page that shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from ....shared.core.version import thresher_version
from ...report.write import environment
from .endpoint import Endpoint

_PARAMETER = re.compile(r"\{(\w+):(\w+)\}")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Endpoints of the microscope</title><link rel="stylesheet" href="/report/report.css"></head>
<body><header class="page-head"><p class="eyebrow">Thresher microscope</p><h1>Endpoints</h1>
<p class="lede">The page uses these, and so can a notebook. <a href="/api/openapi.json">OpenAPI description</a>.
Errors are {"error": "why"}.</p></header><main>
{% for path, methods in paths.items() %}{% for method, operation in methods.items() %}
<section><h2><code>{{ method | upper }} {{ path }}</code></h2><p class="note">{{ operation.summary }}</p>
{% if operation.shown %}<div class="scroll"><table><thead><tr><th class="text plain">Name</th>
<th class="text plain">Type</th><th class="text plain">Default</th></tr></thead><tbody>
{% for row in operation.shown %}<tr><th class="text" scope="row">{{ row.name }}</th><td class="text">{{ row.type }}</td>
<td class="text">{{ row.default }}</td></tr>{% endfor %}</tbody></table></div>{% endif %}</section>
{% endfor %}{% endfor %}</main></body></html>
"""


def openapi(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI description."""
    endpoints = list(endpoints)
    bodies = [each.body for each in endpoints if each.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in endpoints:
        kind = "text/event-stream" if each.streams else "application/json"
        operation: dict[str, Any] = {
            "summary": each.summary,
            "operationId": each.answer.__name__,
            "parameters": [*_in_path(each.path), *_in_query(each.query)],
            "responses": {
                "200": {"description": each.summary, "content": {kind: {}}},
                "422": {"description": "The request is not acceptable; `error` says why."},
            },
        }
        if each.body is not None:
            content = {"application/json": {"schema": by_type[each.body]}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(_PARAMETER.sub(r"{\1}", each.path), {})[each.method.lower()] = operation
    info = {"title": "Thresher microscope", "version": thresher_version()}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}


def _in_path(path: str) -> list[dict[str, Any]]:
    types = {"int": "integer", "path": "string"}
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": types[kind]}}
        for name, kind in _PARAMETER.findall(path)
    ]


def _in_query(query: type[msgspec.Struct]) -> list[dict[str, Any]]:
    schema = msgspec.json.schema(query)["$defs"][query.__name__]
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": kind}
        for name, kind in schema["properties"].items()
    ]


def description_page(description: dict[str, Any]) -> bytes:
    """Return the page that lists the endpoints."""
    schemas = description["components"]["schemas"]
    paths = {
        path: {
            method: operation | {"shown": [*map(_row, operation["parameters"]), *_body_rows(operation, schemas)]}
            for method, operation in methods.items()
        }
        for path, methods in description["paths"].items()
    }
    return environment().from_string(_PAGE).render(paths=paths).encode()


def _row(parameter: dict[str, Any]) -> dict[str, str]:
    schema = parameter["schema"]
    return {"name": parameter["name"], "type": _type(schema), "default": _default(schema, parameter["required"])}


def _body_rows(operation: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, str]]:
    if "requestBody" not in operation:
        return []
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = schemas[reference.rsplit("/", 1)[1]]
    required = schema.get("required", ())
    return [
        {"name": name, "type": _type(kind), "default": _default(kind, name in required)}
        for name, kind in schema["properties"].items()
    ]


def _default(schema: dict[str, Any], required: bool) -> str:
    return "required" if required else str(schema.get("default", "see its own fields"))


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = str(schema.get("type", "any"))
    return f"list of {_type(schema['items'])}" if kind == "array" and schema.get("items") else kind
