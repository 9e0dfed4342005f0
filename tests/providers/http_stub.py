"""A scripted service on a port of this machine: real clients, real sockets, answers from a function of the request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2

Handler = Callable[[httpx2.Request], Any]


@contextmanager
def serving(handler: Handler) -> Iterator[str]:
    """The address of a service that answers with what ``handler`` returns: JSON, or a response of httpx or httpx2.
    Where it returns an exception or raises one, the connection breaks without an answer."""

    class Listener(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            request = httpx2.Request(
                self.command, f"http://stub{self.path}", headers=dict(self.headers), content=content
            )
            try:
                answer = handler(request)
            except Exception as error:
                answer = error
            if isinstance(answer, Exception):
                self.close_connection = True
                return
            status, body = getattr(answer, "status_code", 200), getattr(answer, "content", None)
            body = json.dumps(answer).encode() if body is None else body
            self.send_response(status)
            if (location := getattr(answer, "headers", {}).get("location")) is not None:
                self.send_header("location", location)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = do_PUT = _serve

        def log_message(self, *arguments: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
