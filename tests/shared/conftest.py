"""An S3 server on this machine, and a proxy in front of it that cuts connections; no waiting for disks."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_flush() -> Iterator[None]:
    """Skip flushes: they are slow, and matter only for power failures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thresher.shared.store.local.durable.flush", lambda handle: None)
        yield


class Proxy:
    """Forward TCP connections to a server, count the bytes, and cut connections on request.

    `cut_down` and `cut_up` are lists of how many bytes from the server, or to it, a connection may carry before it is
    cut; each counts for one connection. `on_up` is called with all bytes that went to the server so far.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cut_down: list[int] = []
        self.cut_up: list[int] = []
        self.bytes_down = self.bytes_up = self.n_cuts = 0
        self.refuse = False
        self.on_up: Callable[[int], None] = lambda n_bytes: None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server))
            for source, target, down in ((server, client, True), (client, server, False)):
                threading.Thread(target=self._forward, args=(source, target, down), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, down: bool) -> None:
        passed = 0
        limits = self.cut_down if down else self.cut_up
        try:
            while data := source.recv(1000):
                passed += len(data)
                if limits and passed > limits[0]:
                    limits.pop(0)
                    self.n_cuts += 1
                    break
                target.sendall(data)
                if down:
                    self.bytes_down += len(data)
                else:
                    self.bytes_up += len(data)
                    self.on_up(self.bytes_up)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Start the server once and return its port."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    _, port = running.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")).close()
    yield port
    running.stop()


@pytest.fixture
def s3(s3_port, monkeypatch, tmp_path) -> Callable[[], str]:
    """Point the environment at the server, with a cache of the test's own; return a maker of new URLs."""
    from thresher.shared.store.remote import objects as remote

    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "CLIENT_RETRIES", 0)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "THRESHER_CACHE_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    return lambda: f"s3://bucket/{tmp_path.name}/{next(_NUMBERS)}"


@pytest.fixture
def proxy(s3, s3_port, monkeypatch) -> Iterator[Proxy]:
    """Put a proxy in front of the server for everyone who reads the environment from now on."""
    running = Proxy(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.port}")
    yield running
    running.close()


class Objects:
    """The objects below a URL, as another client reads and changes them."""

    def __init__(self, port: int) -> None:
        import boto3

        self._client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="eu-central-1",
        )

    def read(self, url: str) -> dict[str, bytes]:
        """Return every object by its path below the URL."""
        prefix = url.removeprefix("s3://bucket/") + "/"
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        bodies = [self._client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys]
        return {key.removeprefix(prefix): body for key, body in zip(keys, bodies, strict=True)}

    def write(self, url: str, key: str, content: bytes) -> None:
        """Put an object."""
        name = f"{url.removeprefix('s3://bucket/')}/{key}"
        self._client.put_object(Bucket="bucket", Key=name, Body=content)


@pytest.fixture(scope="session")
def objects(s3_port) -> Objects:
    """Return another client of the server."""
    return Objects(s3_port)


_NUMBERS = itertools.count()
