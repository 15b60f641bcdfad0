"""Run the microscope: open the run, listen, say where, and serve until interrupted."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import webbrowser
from importlib.util import find_spec
from typing import Any

from ...shared.core.errors import ConfigError, OutputError
from ...shared.core.terminal.results import print_result
from .config import DEFAULT_PORT, MicroscopeConfig

_log = logging.getLogger(__name__)

NEEDED = ("starlette", "uvicorn", "duckdb")
TRIED_PORTS = 20


def microscope(config: MicroscopeConfig) -> int:
    """Serve a run until the process is interrupted, and return the exit code.

    Raises:
        ConfigError: a package of the extra is not installed, or the port cannot be had.
        MissingFileError, DataError: those of `open_run`.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the microscope needs {', '.join(missing)}; install the extra: pip install 'thresher[microscope]'"
        )
    import uvicorn

    from .server.application import application
    from .server.security import Access, is_loopback
    from .server.services import Services

    token = config.token
    if token is None and not is_loopback(config.host):
        token = secrets.token_urlsafe(24)
    services = Services.open(config)
    listening = _listen(config.host, config.port)
    try:
        access = Access.of(config.host, config.names, token)
        settings = server_settings(application(services, access))
        address = _address(config.host, listening.getsockname()[1], token)
        server = _announcing(uvicorn.Server)(settings, lambda: _announce(config, address, is_loopback(config.host)))
        services.start()
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # this is how it ends
    finally:
        services.stop()
        listening.close()
    return 0


def server_settings(app: Any) -> Any:
    """Return uvicorn's settings for an application."""
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        ws="none",
    )


def _announcing(base: Any) -> Any:
    """Return a server class that calls a function once the server answers."""

    class Announcing(base):
        def __init__(self, settings: Any, announce: Any):
            super().__init__(settings)
            self._announce = announce

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                self._announce()

    return Announcing


def _announce(config: MicroscopeConfig, address: str, is_local: bool) -> None:
    print_result(f"microscope  {address}")
    if not is_local:
        _log.warning(
            "other machines can reach this address; whoever has the token in it can use the model and change notes, "
            "and the connection is not encrypted"
        )
    if config.open:
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()


def _address(host: str, port: int, token: str | None) -> str:
    shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def _listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens on the port, or without one on the first free of a few."""
    ports = range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS) if port is None else [port]
    reason = ""
    for number in ports:
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, number), family=family, backlog=256)
        except (OSError, OverflowError) as error:
            reason = str(error)
    tried = f"{ports[0]}" if len(ports) == 1 else f"{ports[0]} to {ports[-1]}"
    raise OutputError(f"cannot listen on {host}, port {tried}: {reason}; choose another --port or --host")
