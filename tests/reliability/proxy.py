"""A proxy between client and server that remembers every request, and can kill or distort on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

import httpx2

BEFORE, AFTER = "before", "after"
"""When a hook is called: the server has not seen the request yet; it has acted and the client has not heard of it."""

_NOT_FORWARDED = {"host", "connection", "content-length", "accept-encoding", "transfer-encoding"}


@dataclass
class Sent:
    """One request of a client. ``status`` stays None where no whole answer came from the server."""

    method: str
    path: str
    body: bytes
    status: int | None = None
    answer: bytes = b""

    @property
    def route(self) -> str:
        """Method and path without its query, ids as a star."""
        parts = self.path.partition("?")[0].split("/")
        return f"{self.method} " + "/".join("*" if p.startswith(("ftjob-", "file-", "ft:")) else p for p in parts)


Hook = Callable[[Sent, str], None]
Change = Callable[[Sent], bytes]
Refusal = Callable[[Sent], tuple[int, bytes] | None]


class Proxy:
    """Listens on one loopback port for as long as it lives, whatever becomes of the server behind it.

    ``hook`` is called around every request; ``change_request`` and ``change_answer`` return other bytes for a body;
    ``refuse`` may answer a request with a status and a body instead of the server.
    A server that cannot be reached, or breaks off, is passed on as a broken connection.
    """

    def __init__(self) -> None:
        self.upstream = ""
        self.sent: list[Sent] = []
        self.hook: Hook | None = None
        self.change_request: Change | None = None
        self.change_answer: Change | None = None
        self.refuse: Refusal | None = None
        self._client = httpx2.Client(
            timeout=600, trust_env=False, limits=httpx2.Limits(max_connections=200, max_keepalive_connections=0)
        )
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def log_message(self, format: str, *args: object) -> None:
                return

            def do_GET(self) -> None:
                proxy._handle(self)

            do_POST = do_DELETE = do_GET

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that went away (it was killed) is nothing to report."""

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._client.close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("content-length") or 0)
        sent = Sent(handler.command, handler.path, handler.rfile.read(length))
        if len(sent.body) < length:  # the client died while it was sending
            handler.close_connection = True
            return
        self.sent.append(sent)
        if self.hook is not None:
            self.hook(sent, BEFORE)
        refused = None if self.refuse is None else self.refuse(sent)
        if refused is not None:
            _reply(handler, refused[0], {"content-type": "application/json"}, refused[1])
            return
        body = sent.body if self.change_request is None else self.change_request(sent)
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in _NOT_FORWARDED}
        try:
            url = self.upstream.removesuffix("/v1") + handler.path
            answer = self._client.request(sent.method, url, content=body, headers=headers)
        except httpx2.HTTPError:
            handler.close_connection = True
            with suppress(OSError):
                handler.connection.close()
            return
        sent.status, sent.answer = answer.status_code, answer.content
        if self.hook is not None:
            self.hook(sent, AFTER)
        content = answer.content if self.change_answer is None else self.change_answer(sent)
        _reply(handler, answer.status_code, dict(answer.headers.items()), content)


def _reply(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        if name.lower() not in _NOT_FORWARDED:
            handler.send_header(name, value)
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()
