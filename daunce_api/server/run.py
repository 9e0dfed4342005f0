"""Serving: bind, run, and shut down."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable

import uvicorn

from ..errors import ConfigurationError
from ..providers.endpoint import is_loopback
from ..providers.server_settings import ServerSettings
from .app import create_app

GRACE_SECONDS = 5
"""How long requests in progress may take while the server shuts down."""


def serve(
    settings: ServerSettings,
    host: str,
    port: int,
    *,
    on_ready: Callable[[str], None] | None = None,
    child_of: int | None = None,
) -> None:
    """Serve until Ctrl-C or a signal; with ``child_of``, the descriptor of the pipe to the process that started this
    one, also until that pipe ends.

    ``on_ready`` is called with the base URL once requests are answered.
    Raises ConfigurationError for a host or port that cannot be used, and what the start of the model raises.
    """
    if settings.api_key is None and not is_loopback(host):
        raise ConfigurationError(
            f"{host} can be reached from other machines, and no API key is set. Set one with --api-key or "
            "DAUNCE_SERVE_API_KEY, or serve on 127.0.0.1."
        )
    listener = _bind(host, port)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        # Its errors are the application's, which the gate logs without any text of a request.
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        # Longer than clients keep idle connections (httpx2: 5 s), so that none is reused as it closes.
        timeout_keep_alive=75,
    )

    def ready() -> None:
        if on_ready is not None:
            shown = f"[{host}]" if ":" in host else host
            on_ready(f"http://{shown}:{listener.getsockname()[1]}/v1")

    server = _Server(config, ready)
    if child_of is not None:
        _end_with(child_of, server)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    except KeyboardInterrupt:
        # Ctrl-C is how a server is stopped; everything is closed by now.
        return
    except SystemExit:
        # How newer versions of uvicorn end where the application does not start; older ones return.
        if not hasattr(app.state, "startup_error"):
            raise
    if hasattr(app.state, "startup_error"):
        raise app.state.startup_error from None


class _Server(uvicorn.Server):
    """Says when requests are answered."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With the protocol named asyncio turns Nagle off; without, each answer on a kept connection waits 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another with --port."
        ) from error
    listener.setblocking(False)
    return listener


def _end_with(pipe: int, server: uvicorn.Server) -> None:
    """End this process when a pipe ends, at the latest ``GRACE_SECONDS`` after that."""

    def watch() -> None:
        while os.read(pipe, 4096):  # a thread in a buffered stream would hold its lock, which Python's end waits for
            pass
        server.should_exit = True
        timer = threading.Timer(GRACE_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()

    threading.Thread(target=watch, daemon=True).start()
