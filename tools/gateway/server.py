"""The application: routes, and who may ask what of it."""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coase.agents.compute.router import RouterCompute
from coase.protocol.errors import ConfigurationError

from . import anthropic, ollama, openai
from .common import Wrong

log = logging.getLogger(__name__)

CONCURRENCY_MAX: Final = 64  # Requests inside; more are told so at once.
CLOSE_MAX_S: Final = 5  # For answers under way when it ends.
KEEP_ALIVE_S: Final = 30
LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_ALLOWED: Final = "content-type, authorization, x-api-key, anthropic-version, anthropic-beta"


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Who may ask: by which names of this server, from which web pages, with which keys."""

    hosts: tuple[str, ...] = LOOPBACK
    """Names by which it may be called: a web page of a stranger's calls it by another."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may use it."""
    keys: tuple[str, ...] = ()
    """API keys; with none, nobody is asked for one."""
    concurrency: int = CONCURRENCY_MAX


def application(router: RouterCompute, doors: Doors | None = None) -> ASGIApp:
    """Return the ASGI application that serves ``router`` in all three APIs."""
    app = Starlette(
        routes=[
            Route("/", ollama.root, methods=["GET"]),
            Route("/api/version", ollama.version, methods=["GET"]),
            Route("/api/tags", ollama.tags, methods=["GET"]),
            Route("/api/ps", ollama.ps, methods=["GET"]),
            Route("/api/show", ollama.show, methods=["POST"]),
            Route("/api/chat", ollama.chat, methods=["POST"]),
            Route("/api/generate", ollama.generate, methods=["POST"]),
            Route("/v1/models", openai.models, methods=["GET"]),
            Route("/v1/models/{model:path}", openai.model, methods=["GET"]),
            Route("/v1/chat/completions", openai.chat, methods=["POST"]),
            Route("/v1/completions", openai.completions, methods=["POST"]),
            Route("/v1/messages", anthropic.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
        ],
        exception_handlers={Wrong: _told, HTTPException: _not_here},
    )
    app.state.router = router
    return _Door(app, doors or Doors())


def _shaped(path: str, error: Wrong) -> Response:
    """Return an error in the shape of the API that ``path`` belongs to."""
    face: Any = openai
    if path.startswith("/v1/messages"):
        face = anthropic
    elif not path.startswith("/v1/"):
        face = ollama
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(face.error_body(error), status_code=error.status, headers=headers)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, Wrong)
    return _shaped(request.url.path, error)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path} is not served here"
    return _shaped(request.url.path, Wrong(error.status_code, what))


class _Door:
    """Lets in whom the doors name, so many at a time, and answers browsers about origins."""

    def __init__(self, app: ASGIApp, doors: Doors) -> None:
        self._app, self._doors = app, doors
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except Wrong as error:
            await _shaped(scope["path"], error)(scope, receive, send)
            return
        origin = headers.get("origin", "")
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers=_cors(origin))(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, _with(send, _cors(origin)) if origin else send)
        finally:
            self._inside -= 1

    def _check(self, scope: Scope, headers: Headers) -> None:
        doors = self._doors
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in doors.hosts:
            raise Wrong(403, f"this server is not called {name!r}; see --allow-host")
        origin = headers.get("origin")
        if origin is not None and origin not in doors.origins:
            raise Wrong(403, f"pages of {origin} may not ask here; see --allow-origin")
        if scope["method"] == "OPTIONS":
            return
        if doors.keys and scope["path"] != "/":
            self._check_key(headers)
        if self._inside >= doors.concurrency:
            raise Wrong(429, f"{self._inside} requests are being answered already")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        known = False
        for key in self._doors.keys:  # All of them, so that the time tells nothing.
            known |= hmac.compare_digest(given.encode(), key.encode())
        if not known:
            raise Wrong(401, "an API key of this gateway is needed")


def _cors(origin: str) -> dict[str, str]:
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": _ALLOWED,
        "access-control-expose-headers": "*",
        "vary": "origin",
    }


def _with(send: Send, more: dict[str, str]) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in more.items():
                headers[name] = value
        await send(message)

    return sending


@asynccontextmanager
async def serving(app: ASGIApp, *, host: str, port: int) -> AsyncIterator[str]:
    """Serve ``app`` for the length of the block and yield its address; port 0 is any free one.

    :raises ConfigurationError: if it cannot listen there
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_MAX_S,
    )
    try:
        listener = _listen(host, port)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigurationError(f"cannot listen on {host}:{port}: {why}; see --port") from None
    server = _Server(config)
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, [listener])
        try:
            at = listener.getsockname()
            name = f"[{at[0]}]" if ":" in at[0] else at[0]
            yield f"http://{name}:{at[1]}"
        finally:
            server.should_exit = True


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Catch none."""
        yield


def _listen(host: str, port: int) -> Any:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def read_keys(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of a file with one a line; empty lines and comments are passed over.

    :raises ConfigurationError: if it has none
    """
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigurationError("the key file has no key: write one a line")
    return keys
