"""Which requests are answered at all: by host, origin, token, size and number; and the headers of every answer.

A page of another site may send requests to this machine, and by DNS rebinding may even make its name point here. So
requests must name a host that is ours, and those that a browser sends from another site are refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "thresher_token"
MAX_BODY = 1 << 20
MAX_REQUESTS = 200
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        names: host names that are ours, in lower case.
        any_address: whether any IP address is ours too, as it is when the server listens on all of them.
        token: what each request must bring, or None.
    """

    names: frozenset[str]
    any_address: bool = False
    token: str | None = None
    max_body: int = MAX_BODY
    max_requests: int = MAX_REQUESTS

    @classmethod
    def of(cls, host: str, names: Iterable[str], token: str | None) -> Access:
        """Return the rules of a server that listens on `host`."""
        known = {*LOOPBACK_NAMES, *(name.lower() for name in names)}
        everywhere = host in ("0.0.0.0", "::", "")
        known |= {socket.gethostname().lower(), socket.getfqdn().lower()} if everywhere else {host.lower()}
        return cls(frozenset(known), everywhere, token)

    def knows(self, host: str) -> bool:
        """Return whether a Host header names this server. An IP address cannot be rebound; a name can."""
        name = _host_name(host)
        if name in self.names:
            return True
        return self.any_address and _is_address(name)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server on that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass
class _Refusal(Exception):
    status: int
    reason: str
    headers: dict[str, str] = field(default_factory=dict)


class Guard:
    """ASGI middleware that applies the rules before anything else sees a request."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no web sockets
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_sender(scope, headers)
            self._check_token(scope, headers)
            body = await self._body(scope, headers, receive)
        except _Refusal as refusal:
            return await _refuse(send, refusal)
        if self._running >= self._access.max_requests:
            return await _refuse(send, _Refusal(503, "too many requests at once; try again", {"retry-after": "1"}))
        self._running += 1
        try:
            return await self._app(scope, _replay(body, receive), _with_headers(send))
        finally:
            self._running -= 1

    def _check_sender(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if sum(name == b"host" for name, _ in scope["headers"]) != 1 or not self._access.knows(host):
            raise _Refusal(421, "this server does not answer for that host; start it with --names to add one")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise _Refusal(403, "requests of other sites are refused")
        navigates = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and not navigates:
            raise _Refusal(403, "requests of other sites are refused")
        if scope["method"] not in ("GET", "HEAD", "POST", "PUT"):
            raise _Refusal(405, "this method is not known")
        if scope["method"] in ("POST", "PUT") and not _is_json(headers):
            raise _Refusal(415, "expected a body of content-type application/json")

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        token = self._access.token
        if token is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(given.strip(), token):
            return
        if _same(_cookie(headers.get("cookie", "")), token):
            return
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] == "GET" and _same((query.pop("token", None) or [""])[0], token):
            rest = urlencode(query, doseq=True)
            cookie = f"{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/"
            raise _Refusal(303, "", {"location": scope["path"] + (f"?{rest}" if rest else ""), "set-cookie": cookie})
        raise _Refusal(
            401,
            "a token is needed: open the address that the server printed, or send it as a bearer token",
            {"www-authenticate": "Bearer"},
        )

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes:
        limit = self._access.max_body
        too_large = _Refusal(413, f"the request's body is larger than {limit:,} bytes", {"connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            raise too_large
        if scope["method"] not in ("POST", "PUT"):
            return b""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Refusal(400, "the request ended before its body")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


def _is_json(headers: dict[str, str]) -> bool:
    return headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, and then what the connection says."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send) -> Send:
    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message.get("headers", ())}
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in there]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return send_on


async def _refuse(send: Send, refusal: _Refusal) -> None:
    body = json.dumps({"error": refusal.reason}).encode() if refusal.reason else b""
    headers = HEADERS | {"content-type": "application/json", "content-length": str(len(body))} | refusal.headers
    start = {"type": "http.response.start", "status": refusal.status}
    await send(start | {"headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})
