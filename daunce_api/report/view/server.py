"""The server of ``daunce view``: loopback only, a secret token in every address, Host and Origin checked.

Pages and scripts are files of this package; texts of runs reach them as JSON and become text nodes, never markup.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from ...errors import ConfigurationError, DaunceError, MissingExtraError
from ...providers.endpoint import is_loopback
from .runs import Runs

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("daunce view", "view") from error

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_ACTIONS = ("mark", "price", "ask", "fix")
_MOST_BYTES = 1_000_000
_STATIC = {"view.js": "text/javascript", "view.css": "text/css"}


class _Guard:
    """Lets through only requests of this server's own pages: right host, right origin, right token."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given, _, path = scope["path"].removeprefix("/").partition("/")
        origin = headers.get("origin")
        if headers.get("host", "").lower() not in self._hosts:
            code, words = 421, "This server answers to its own address on this machine only."
        elif (origin is not None and origin.lower() not in {f"http://{host}" for host in self._hosts}) or headers.get(
            "sec-fetch-site", "none"
        ) not in ("none", "same-origin"):
            code, words = 403, "Requests of other pages are refused."
        elif not secrets.compare_digest(given.encode(), self._token.encode()):
            code, words = 404, "The address lacks the token that daunce view printed."
        else:
            inner = {**scope, "path": f"/{path}", "root_path": "", "raw_path": f"/{path}".encode()}
            await self._app(inner, receive, _with_headers(send))
            return
        await PlainTextResponse(words, code)(scope, receive, _with_headers(send))


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_HEADERS)
        await send(message)

    return sending


def view_app(runs: Runs, token: str, hosts: frozenset[str]) -> ASGIApp:
    """The application behind its guard.

    Args:
        runs: what is shown.
        token: the first part of every path.
        hosts: values of the Host header that are answered, such as ``127.0.0.1:8750``.
    """
    return _Guard(_routes(runs), token, hosts)


def _routes(runs: Runs) -> Starlette:
    async def answer(make: Callable[[], Any]) -> Response:
        """JSON of something that is read in a thread; errors become a sentence."""
        try:
            return JSONResponse(await asyncio.to_thread(make))
        except KeyError:
            return JSONResponse({"problem": "There is no such run (any more) in this folder."}, 404)
        except (DaunceError, OSError) as error:
            return JSONResponse({"problem": str(error)}, 409)

    async def page(request: Request) -> Response:
        text = (files(__package__) / "static" / "view.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _PAGE_POLICY})

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _STATIC:
            return Response(status_code=404)
        return Response((files(__package__) / "static" / name).read_bytes(), media_type=_STATIC[name])

    async def listed(request: Request) -> Response:
        return await answer(lambda: {"folder": str(runs.folder), "runs": runs.listed()})

    async def one(request: Request) -> Response:
        identity = request.path_params["run"]
        return await answer(lambda: runs.state(identity) | {"questions": runs.questions(identity)})

    async def compare(request: Request) -> Response:
        asked = request.query_params
        return await answer(lambda: runs.compared(asked.get("a", ""), asked.get("b", ""), asked.get("test")))

    async def posted(request: Request) -> dict[str, Any]:
        """The JSON object of a request. Raises ConfigurationError for anything else."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise ConfigurationError("A request needs a JSON body.")
        raw = b""
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > _MOST_BYTES:
                raise ConfigurationError(f"A request is larger than {_MOST_BYTES:,} bytes.")
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError("A request needs a JSON body.") from error
        if not isinstance(content, dict):
            raise ConfigurationError("A request needs a JSON object.")
        return content

    async def act(request: Request) -> Response:
        identity, action = request.path_params["run"], request.path_params["action"]
        if action not in _ACTIONS:
            return JSONResponse({"problem": "There is no such action."}, 404)
        try:
            content = await posted(request)
            if action == "mark":
                verdict = content.get("verdict")
                if verdict not in ("wanted", "unwanted", None):
                    raise ConfigurationError("A verdict is wanted, unwanted or null.")
                return await answer(lambda: runs.mark(identity, _text(content, "question"), verdict))
            if action == "fix":
                return await answer(lambda: runs.fix(identity))
            system = _text(content, "system", needed=False)
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": _text(content, "prompt")})
            reply = _text(content, "answer")
            if action == "price":
                return await answer(lambda: runs.price(identity, turns, reply))
            usd = content.get("usd")
            if usd is not None and (isinstance(usd, bool) or not isinstance(usd, int | float)):
                raise ConfigurationError("usd is a number or null.")
            return await answer(lambda: runs.ask(identity, turns, reply, usd))
        except DaunceError as error:
            return JSONResponse({"problem": str(error)}, 400)

    async def report(request: Request) -> Response:
        try:
            identity, _, group = request.path_params["run"].partition("-")
            text = await asyncio.to_thread(runs.report, identity, int(group) if group.isdecimal() else 1)
        except KeyError:
            return PlainTextResponse("There is no such run (any more) in this folder.", 404)
        except (DaunceError, OSError) as error:
            return PlainTextResponse(str(error), 409)
        # The page carries its own policy; this one adds what a policy in a page cannot say.
        return HTMLResponse(text, headers={"content-security-policy": "frame-ancestors 'none'"})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/static/{name}", static),
            Route("/api/runs", listed),
            Route("/api/runs/{run}", one),
            Route("/api/runs/{run}/{action}", act, methods=["POST"]),
            Route("/api/compare", compare),
            Route("/report/{run}", report),
        ]
    )


def _text(content: Mapping[str, Any], name: str, *, needed: bool = True) -> str:
    value = content.get(name, "")
    if not isinstance(value, str) or (needed and not value.strip()):
        raise ConfigurationError(f"{name} is missing.")
    return value


def serve(runs: Runs, *, host: str = "127.0.0.1", port: int = 0, on_start: Callable[[str], None]) -> None:
    """Serve the page of some runs until interrupted.

    Args:
        runs: what is shown.
        host: a loopback address.
        port: 0 = any free one.
        on_start: called with the address, token included, once the server listens.

    Raises ConfigurationError for another than a loopback address or a port that is taken.
    """
    if not is_loopback(host):
        raise ConfigurationError(f"daunce view serves this machine only: {host} is not a loopback address.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, so that asyncio turns Nagle off
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigurationError(
            f"Port {port} of {host} cannot be used ({error.strerror}); try another --port."
        ) from error
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    app = view_app(runs, token, frozenset({f"{shown}:{port}", f"localhost:{port}"}))
    config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", server_header=False)
    with listening:
        listening.listen()
        on_start(f"http://{shown}:{port}/{token}/")
        uvicorn.Server(config).run(sockets=[listening])
