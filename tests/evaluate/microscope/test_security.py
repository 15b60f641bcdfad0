"""What must be refused: other hosts and sites, missing tokens, large bodies, too many requests, and paths."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from thresher.evaluate.microscope.server import security
from thresher.evaluate.microscope.server.security import Access, Guard, is_loopback

TOKEN = "a-secret-of-more-than-sixteen"


@pytest.fixture(scope="module")
def client(scope):
    return scope.client


@pytest.fixture(scope="module")
def closed(serve, run_folder):
    """A server that needs a token."""
    access = Access.of("0.0.0.0", ("notes.example",), TOKEN)
    return serve(access, run=str(run_folder), encoder=False, model=False).client


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1", "[::1]:80"])
def test_this_machines_names_are_answered(client, host):
    client.json("GET", "/api/status", host=host)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5", "", "[", "a@b", "127.1"]
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(client, host):
    """As in DNS rebinding, where a page of another site reaches this server under the site's own name."""
    assert "does not answer for that host" in client.json("GET", "/api/status", host=host, status=421)["error"]
    client.json("PUT", "/api/notes", {"sae": "topk_k2", "latent": 1, "label": "x"}, host=host, status=421)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"])
def test_a_request_that_another_site_sends_is_refused(client, origin):
    note = {"sae": "topk_k2", "latent": 1, "label": "forged"}
    client.json("PUT", "/api/notes", note, origin=origin, status=403)
    client.json("POST", "/api/steer", {"prompt": "self"}, origin=origin, status=403)
    client.json("GET", "/api/notes", origin=origin, status=403)
    assert client.json("GET", "/api/notes")["notes"] == []


def test_a_request_of_the_page_itself_is_answered(client):
    client.json("GET", "/api/status", origin=f"http://127.0.0.1:{client.port}", sec_fetch_site="same-origin")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_to_the_page_and_to_nothing_else(client, site):
    assert client.send("GET", "/", sec_fetch_site=site, sec_fetch_mode="navigate")[0] == 200
    assert client.send("GET", "/", sec_fetch_site=site, sec_fetch_mode="no-cors")[0] == 403
    assert client.send("GET", "/api/notes", sec_fetch_site=site, sec_fetch_mode="navigate")[0] == 403
    assert client.send("GET", "/app.js", sec_fetch_site=site, sec_fetch_mode="no-cors")[0] == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_can_send_is_not_read(client, kind):
    body = json.dumps({"sae": "topk_k2", "latent": 1, "label": "forged"}).encode()
    assert client.send("PUT", "/api/notes", body, content_type=kind)[0] == 415


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client, method):
    assert client.send(method, "/api/notes")[0] == 405


def test_every_answer_has_the_headers_of_a_strict_policy(client):
    for path, status in (("/", 200), ("/app.js", 200), ("/api/saes", 200), ("/api/nothing", 404), ("/api", 200)):
        got, headers, _ = client.send("GET", path)
        assert got == status
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
    assert "content-security-policy" in client.send("GET", "/", host="evil.example")[1]


def test_a_large_body_is_refused_whether_or_not_its_length_is_said(client):
    large = b'{"text": "' + b"a" * security.MAX_BODY + b'"}'
    with socket.create_connection(("127.0.0.1", client.port)) as sent:
        head = "POST /api/activations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sent.sendall(f"{head}Content-Length: {len(large)}\r\n\r\n".encode())
        assert sent.recv(4096).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", client.port)) as sent:
        sent.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        answered = b""
        try:
            for start in range(0, len(large), 65536):
                part = large[start : start + 65536]
                sent.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            answered = sent.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            answered = answered or sent.recv(4096)
        assert answered.startswith(b"HTTP/1.1 413")


def test_without_its_token_nothing_is_answered(closed):
    for path in ("/", "/api/saes", "/app.js", "/api/notes", "/?token=wrong-but-also-long-enough"):
        assert closed.json("GET", path, status=401)["error"].startswith("a token is needed")
    assert closed.json("GET", "/api/saes", authorization="Bearer wrong", status=401)
    assert closed.json("GET", "/api/saes", cookie="thresher_token=wrong", status=401)
    assert closed.json("GET", "/api/saes", cookie='thresher_token="', status=401)
    note = {"sae": "topk_k2", "latent": 1, "label": "forged"}
    assert closed.json("PUT", f"/api/notes?token={TOKEN}", note, status=401), "a link must not change anything"


def test_the_printed_address_gives_the_browser_a_cookie_that_scripts_cannot_read(closed):
    status, headers, _ = closed.send("GET", f"/?token={TOKEN}&a=1")
    assert (status, headers["location"]) == (303, "/?a=1")
    cookie, *flags = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(flags)
    assert closed.json("GET", "/api/saes", cookie=cookie)["saes"]
    assert closed.json("GET", "/api/saes", authorization=f"Bearer {TOKEN}")["saes"]


def test_a_server_on_all_addresses_answers_for_addresses_and_given_names_only(closed):
    own = {"authorization": f"Bearer {TOKEN}"}
    for host in ("192.168.1.5:8765", "[fe80::1]", "notes.example", socket.gethostname()):
        assert closed.json("GET", "/api/saes", host=host, **own)["saes"]
    closed.json("GET", "/api/saes", host="evil.example", status=421, **own)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")),
    ],
)
def test_which_addresses_only_this_machine_reaches(host, expected):
    assert is_loopback(host) is expected


def test_more_requests_at_once_than_allowed_are_refused_and_then_answered_again():
    waiting = asyncio.Event()

    async def slow(scope, receive, send):
        await waiting.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(slow, Access(frozenset({"localhost"}), max_requests=2))

    async def ask():
        said = []

        async def send(message):
            said.append(message)

        async def receive():
            return {"type": "http.request"}

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }
        await guard(scope, receive, send)
        return said[0]["status"]

    async def all_of_them():
        first = [asyncio.create_task(ask()) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await ask()
        waiting.set()
        return refused, await asyncio.gather(*first), await ask()

    assert asyncio.run(all_of_them()) == (503, [200, 200], 200)


OUTSIDE = """/../pyproject.toml /%2e%2e/config.py /report/..%2fwrite.py /report//etc/passwd /page/app.js /app.py
/parts/../app.js /\\..\\config.py /report/report.html /__init__.py"""


@pytest.mark.parametrize("path", OUTSIDE.split())
def test_only_the_pages_own_files_are_served(client, path):
    assert client.send("GET", path)[0] == 404
