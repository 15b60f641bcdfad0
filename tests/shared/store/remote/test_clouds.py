"""Google Cloud Storage and Azure: what can be held to their protocols without their servers.

The stand-ins answer the requests that obstore makes, after the services' documentation: whole objects, ranges, lists,
deletions and conditional puts, by generation at Google and by ETag at Azure. They check no signature and know no
multipart upload.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core import cli
from thresher.shared.core.errors import MissingFileError, StoreBusyError
from thresher.shared.core.location import locate
from thresher.shared.store.remote.lease import LEASE
from thresher.shared.store.remote.objects import ChangedObjectError, RemoteStore

N, CONTEXT, WIDTHS = 20, 8, {"a": 12, "b": 5}
WHEN = "Sat, 01 Nov 2025 10:00:00 GMT"
ACCOUNT = "devstoreaccount1"
CONFIGS = Path(__file__).parents[4] / "configs"
URLS = {"gs": "gs://bucket/some/store", "az": "az://bucket/some/store"}


class StandIn(BaseHTTPRequestHandler):
    """A server with one bucket; `objects` maps names to (content, generation)."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, int]]
    lock: threading.Lock
    generations: Iterator[int]

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def name(self) -> str:
        """Return the name of the object that is asked for, in whichever service's way; empty for the bucket."""
        path = unquote(urlsplit(self.path).path).removeprefix(f"/{ACCOUNT}").removeprefix("/bucket")
        return path.removeprefix("/")

    def answer(self, status: int, content: bytes = b"", generation: int = 0, **headers: str) -> None:
        """Send a response."""
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(content)),
            "Last-Modified": WHEN,
            "ETag": f'"tag-{generation}"',
            "x-goog-generation": str(generation),
        }.items():
            self.send_header(key, value)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        """Return an object, some of its bytes, or the names of all."""
        if not self.name():
            self.answer(200, self.listing())
            return
        if self.name() not in self.objects:
            self.answer(404)
            return
        content, generation = self.objects[self.name()]
        if "Range" not in self.headers:
            self.answer(200, content, generation)
            return
        start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[start : stop + 1]
        self.answer(206, part, generation, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(content)}")

    do_HEAD = do_GET

    def listing(self) -> bytes:
        """Return the names below a prefix, as each service does."""
        query = parse_qs(urlsplit(self.path).query)
        found = [(name, len(self.objects[name][0])) for name in self.objects if name.startswith(query["prefix"][0])]
        if "comp" in query:
            blobs = "".join(
                f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{WHEN}</Last-Modified><Etag>x</Etag>"
                f"<Content-Length>{size}</Content-Length><Content-Type>x/y</Content-Type></Properties></Blob>"
                for name, size in found
            )
            return f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>".encode()
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>x</ETag>"
            "<LastModified>2025-11-01T10:00:00.000Z</LastModified></Contents>"
            for name, size in found
        )
        return f"<ListBucketResult>{entries}</ListBucketResult>".encode()

    def do_PUT(self) -> None:
        """Write an object, if it is as the request expects."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            now = self.objects.get(self.name(), (b"", 0))[1]
            at_google = self.headers.get("x-goog-if-generation-match")
            if at_google is not None and int(at_google) != now:
                self.answer(412)
            elif self.headers.get("If-None-Match") == "*" and now:
                self.answer(409)
            elif self.headers.get("If-Match") not in (None, f'"tag-{now}"'):
                self.answer(412)
            else:
                self.objects[self.name()] = content, next(self.generations)
                self.answer(201, b"", self.objects[self.name()][1])

    def do_DELETE(self) -> None:
        """Remove an object."""
        self.answer(204 if self.objects.pop(self.name(), None) else 404)

    def do_POST(self) -> None:
        """Remove what an Azure batch names."""
        batch = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [line.split()[1] for line in batch.splitlines() if line.startswith("DELETE ")]
        parts = []
        for number, self.path in enumerate(lines):
            status = "202 Accepted" if self.objects.pop(self.name(), None) else "404 Not Found"
            parts.append(
                f"--b\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
            )
        self.answer(202, ("".join(parts) + "--b--\r\n").encode(), Content_Type="multipart/mixed; boundary=b")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[StandIn]]:
    """Start a stand-in and point obstore to it by the environment; return its handler, which has the objects."""
    obstore = pytest.importorskip("obstore")

    class Handler(StandIn):
        objects = {}
        lock = threading.Lock()
        generations = itertools.count(1)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    place = f"http://127.0.0.1:{server.server_port}"
    key = {"gcs_base_url": place, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", place)
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    from_url = obstore.store.from_url

    def without_tls(url: str, **options: dict[str, object]) -> object:
        options["client_options"]["allow_http"] = True
        return from_url(url, **options)

    monkeypatch.setattr(obstore.store, "from_url", without_tls)
    yield Handler
    server.shutdown()
    thread.join()
    server.server_close()


def write(place: str | Path, **settings: object) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(N, CONTEXT, d, generator=generator) for name, d in WIDTHS.items()}
    with ActivationStoreWriter(place, WIDTHS, CONTEXT, chunk_bytes=200, shard_bytes=2000, **settings) as writer:
        writer.append(rows, torch.arange(N * CONTEXT).reshape(N, CONTEXT))


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_store_is_written_and_read_by_the_protocol_of_each_service(stand_in, tmp_path, scheme):
    write(tmp_path / "local")
    write(URLS[scheme])
    files = {str(p.relative_to(tmp_path / "local")): p for p in (tmp_path / "local").rglob("*") if p.is_file()}
    assert {name: content for name, (content, _) in stand_in.objects.items()} == {
        f"some/store/{name}": path.read_bytes() for name, path in files.items()
    }, "and the lease was given back"
    local = ActivationStore.open(tmp_path / "local")
    order = np.random.default_rng(0).permutation(local.n_chunks)
    for cache_bytes in (None, 0):
        store = ActivationStore.open(URLS[scheme], cache_bytes=cache_bytes)
        assert torch.equal(store.read_chunks("a", order), local.read_chunks("a", order))
    assert store.verify() == []
    with pytest.raises(MissingFileError, match="no activation store at"):
        ActivationStore.open(URLS[scheme] + "2")


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_of_two_writers_one_is_refused_by_the_protocol_of_each_service(stand_in, tmp_path, scheme):
    writer = ActivationStoreWriter(URLS[scheme], WIDTHS, CONTEXT)
    with pytest.raises(StoreBusyError, match=f"another process is writing to the store '{URLS[scheme]}'"):
        ActivationStoreWriter(URLS[scheme], WIDTHS, CONTEXT, cache=tmp_path / "elsewhere")
    writer.abandon()
    assert f"some/store/{LEASE}" not in stand_in.objects
    remote = RemoteStore(locate(URLS[scheme]))
    first = remote.replace("x", b"1", None)
    with pytest.raises(ChangedObjectError):
        remote.replace("x", b"0", None)
    second = remote.replace("x", b"2", first)
    assert remote.replace("x", b"2", first) == second, "as when the answer to the first try was lost"
    with pytest.raises(ChangedObjectError):
        remote.replace("x", b"3", first)
    remote.replace("x", b"4", remote.get_version("x")[1])
    assert stand_in.objects["some/store/x"][0] == b"4"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what runs the command line without credentials, and returns the one line that it ends with."""
    for name in ("GOOGLE_SERVICE_ACCOUNT_KEY", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_missing_package_is_named(monkeypatch, run, scheme):
    url = f"{scheme}://bucket/store"
    monkeypatch.setitem(sys.modules, "obstore", None)
    said = f"error: reading or writing '{url}' needs obstore, which is not installed: pip install 'thresher[remote]'"
    assert run("store", "info", url) == said
    for stage in ("harvest", "train", "evaluate"):
        assert run(stage, str(CONFIGS / stage / "demo.toml"), "--store", url) == said


def test_missing_credentials_are_named(monkeypatch, run, tmp_path):
    pytest.importorskip("obstore")
    line = run("store", "info", "az://container/store")
    assert line.startswith("error: cannot connect to 'az://container/store': Generic MicrosoftAzure error: ")
    assert line.endswith("; check the environment (AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY and so on)")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "nothing.json"))
    line = run("store", "info", "gs://bucket/store")
    assert line.startswith("error: cannot connect to 'gs://bucket/store': Generic GCS error: ")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in line
