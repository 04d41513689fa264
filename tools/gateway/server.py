"""The application: routes, and who may ask what of it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coase.agents.backends.sqlite import disk_failed, disk_refused
from coase.agents.charges import charging
from coase.agents.compute.router import RouterCompute
from coase.agents.purse import Budget
from coase.protocol.errors import CoaseError, ConfigurationError, JournalFailed

from . import anthropic, ollama, openai
from .calls import SCOPE, TAG_HEADER, Call, tag_of
from .common import Wrong, wrong
from .keys import ApiKey, Callers, digest_of
from .places import PLACE, NoPlace, Places
from .sending import WATCH, Watch

if TYPE_CHECKING:
    from .calls import Till
    from .keys import KeyFile
    from .usage import UsageJournal

log = logging.getLogger(__name__)

CONCURRENCY_MAX: Final = 512  # Requests inside; more are told so at once.
CLOSE_MAX_S: Final = 5  # For answers under way when it ends.
KEEP_ALIVE_S: Final = 30
# Programs send some hundred bytes of headers, browsers with many cookies some thousand.
HEAD_SIZE_MAX_BYTES: Final = 64 * 1024
CLIENT_WENT: Final = 499  # What is written down of a client that did not wait for any status.
PREFLIGHT_AGE_S: Final = 600  # For so long a browser need not ask again.
LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_METHODS: Final = "GET, HEAD, POST, DELETE, OPTIONS"
_ALLOWED: Final = "content-type, authorization, x-api-key, anthropic-version, x-coase-tag"
_NO_KEY: Final = ApiKey(name="", digest="", begins="", made_s=0, budget=Budget())
_ENDS: Final = "the gateway ends; ask again when it is back"
_MODELS_STAY: Final = "this is not served here: models are changed where they are, by their engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Who may ask: by which names of this server, from which web pages, with which keys."""

    hosts: tuple[str, ...] = LOOPBACK
    """Names by which it may be called: a web page of a stranger's calls it by another."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may use it; one that ends in ``*`` stands for all that begin so."""
    keys: tuple[str, ...] = ()
    """API keys without limits of their own."""
    key_file: KeyFile | None = None
    """Where there are keys with limits. With no key at all nobody is asked for one."""
    keyed: bool = False
    """Whether a key must be given even while there is none, since others than us can ask."""
    concurrency: int = CONCURRENCY_MAX

    def allow(self, origin: str) -> bool:
        """Return whether pages of ``origin`` may ask."""
        return any(
            origin == each or (each.endswith("*") and origin.startswith(each[:-1]))
            for each in self.origins
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """Who pays, and where it is written down what was used."""

    till: Till | None = None
    usage: UsageJournal | None = None
    trouble: Callable[[], CoaseError | None] = lambda: None
    """Why nothing can be written down any more, if that is so."""


def application(
    router: RouterCompute, doors: Doors | None = None, books: Books | None = None
) -> ASGIApp:
    """Return the ASGI application that serves ``router`` in all three APIs."""
    stay = ["POST", "DELETE", "HEAD"]
    app = Starlette(
        routes=[
            Route("/", ollama.root, methods=["GET"]),
            Route("/api/version", ollama.version, methods=["GET"]),
            Route("/api/tags", ollama.tags, methods=["GET"]),
            Route("/api/ps", ollama.ps, methods=["GET"]),
            Route("/api/show", ollama.show, methods=["POST"]),
            Route("/api/chat", ollama.chat, methods=["POST"]),
            Route("/api/generate", ollama.generate, methods=["POST"]),
            Route("/api/embed", ollama.embed, methods=["POST"]),
            Route("/api/embeddings", ollama.embeddings, methods=["POST"]),
            *(Route(f"/api/{name}", _models_stay, methods=stay) for name in _OLLAMA_CHANGES),
            Route("/api/blobs/{digest}", _models_stay, methods=stay),
            Route("/v1/models", openai.models, methods=["GET"]),
            Route("/v1/models/", openai.models, methods=["GET"]),
            Route("/v1/models/{model:path}", openai.model, methods=["GET"]),
            Route("/v1/chat/completions", openai.chat, methods=["POST"]),
            Route("/v1/completions", openai.completions, methods=["POST"]),
            Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
            Route("/v1/messages", anthropic.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
        ],
        exception_handlers={Wrong: _told, HTTPException: _not_here, Exception: _our_fault},
    )
    app.state.router = router
    return _Door(app, doors or Doors(), books or Books())


_OLLAMA_CHANGES: Final = ("pull", "push", "create", "copy", "delete")


async def _models_stay(request: Request) -> Response:
    raise Wrong(501, _MODELS_STAY)


def _shaped(path: str, headers: Headers, error: Wrong) -> Response:
    """Return an error in the shape of the API that ``path`` belongs to."""
    face: Any = openai
    if path.startswith("/v1/messages") or "anthropic-version" in headers:
        face = anthropic
    elif path.startswith("/api") or path == "/":
        face = ollama
    more = {"retry-after": "1"} if error.status in (429, 503, 507) else None
    return JSONResponse(face.error_body(error), status_code=error.status, headers=more)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, Wrong)
    return _shaped(request.url.path, request.headers, error)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path} is not served here"
    return _shaped(request.url.path, request.headers, Wrong(error.status_code, what))


async def _our_fault(request: Request, error: Exception) -> Response:
    if disk_refused(error):
        told = wrong(disk_failed("it failed at this request", error))
        return _shaped(request.url.path, request.headers, told)
    what = "the gateway failed at this request; its log says where"
    return _shaped(request.url.path, request.headers, Wrong(500, what))


def sorry(error: CoaseError) -> ASGIApp:
    """Return an application that tells everybody why nothing is served now."""
    told = wrong(error)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _shaped(scope["path"], Headers(scope=scope), told)(scope, receive, send)

    return app


class _Door:
    """Lets in whom the doors name, so many at a time, and answers browsers about origins."""

    def __init__(self, app: ASGIApp, doors: Doors, books: Books) -> None:
        self._app, self._doors, self._books = app, doors, books
        self._plain = {digest_of(key): f"key {at}" for at, key in enumerate(doors.keys, 1)}
        self._places = Places(self._doors.concurrency)
        self._watches: set[Watch] = set()
        self._ending = False

    def end(self) -> None:
        """Answer all who wait for a first word that there will be none."""
        self._ending = True
        for watch in self._watches:
            watch.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        allowed = bool(origin) and self._doors.allow(origin)
        if allowed:
            send = _with(send, _cors(origin))
        try:
            key = self._check(scope, headers, allowed=allowed)
        except Wrong as error:
            await _shaped(scope["path"], headers, error)(scope, receive, send)
            return
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers=_preflight(headers))(scope, receive, send)
            return
        await self._let_in(key, scope, receive, send)

    async def _let_in(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        tag = tag_of(Headers(scope=scope).get(TAG_HEADER, ""))
        account = key.name if key.digest else ""
        call = scope[SCOPE] = Call(till=self._books.till, key=key.name, account=account, tag=tag)
        watch = scope[WATCH] = Watch(receive)
        self._watches.add(watch)
        status = CLIENT_WENT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                watch.end()
            await send(message)

        try:
            with self._places.taken(_caller(scope, key)) as scope[PLACE], charging(call.charge):
                await watch.over(self._app(scope, receive, sending))
                if self._ending and not watch.gone and status == CLIENT_WENT:
                    error = self._books.trouble()
                    told = wrong(error) if error is not None else Wrong(503, _ENDS)
                    headers = Headers(scope=scope)
                    await _shaped(scope["path"], headers, told)(scope, receive, sending)
        finally:
            self._watches.discard(watch)
            try:
                call.over(self._books.usage, status)
            except (JournalFailed, ConfigurationError) as error:
                # The money is in the agent's journal, not in this.
                log.error("a call was not written down: %s", error)

    def _check(self, scope: Scope, headers: Headers, *, allowed: bool) -> ApiKey:
        """Return with which key somebody comes; one without a name if none is needed."""
        doors = self._doors
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in doors.hosts:
            raise Wrong(403, f"this server is not called {name!r}; see --allow-host")
        origin = headers.get("origin")
        if origin is not None and not allowed:
            raise Wrong(403, f"pages of {origin} may not ask here; see --allow-origin")
        if scope["method"] == "OPTIONS" or scope["path"] == "/":
            return _NO_KEY
        key = self._key(headers)
        try:
            self._places.check(_caller(scope, key))
        except NoPlace as error:
            raise Wrong(429, str(error)) from None
        return key

    def _key(self, headers: Headers) -> ApiKey:
        callers = self._callers()
        if not (self._plain or callers.keys or self._doors.keyed):
            return _NO_KEY
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        key = callers.find(given)
        if key is None and given and (name := self._plain.get(digest_of(given))):
            key = replace(_NO_KEY, name=name)
        if key is None:
            what = "this is no key" if given else "an API key is needed: one"
            raise Wrong(401, f"{what} of this gateway; its owner makes one: coase gateway keys add")
        return key

    def _callers(self) -> Callers:
        """Return who has a key now; their limits count from the moment on that they are read."""
        if self._doors.key_file is None:
            return Callers({})
        try:
            callers, new = self._doors.key_file.callers()
            if new and self._books.till is not None:
                for key in callers.keys.values():
                    self._books.till.purse.set_account(key.name, key.budget)
        except ConfigurationError as error:
            log.error("nobody is let in: %s", error)
            raise Wrong(503, "the keys of this gateway cannot be read; its log says why") from error
        return callers


def _caller(scope: Scope, key: ApiKey) -> str:
    """Return whose places a request takes: those of its key, else of the address it is from."""
    client = scope.get("client")
    return f"key {key.name}" if key.name else str(client[0]) if client else ""


def _preflight(headers: Headers) -> dict[str, str]:
    """Return what a browser may do; what a client sends along is the client's business."""
    found = {
        "access-control-allow-methods": _METHODS,
        "access-control-allow-headers": headers.get("access-control-request-headers") or _ALLOWED,
        "access-control-max-age": str(PREFLIGHT_AGE_S),
    }
    if headers.get("access-control-request-private-network") == "true":
        found["access-control-allow-private-network"] = "true"
    return found


def _cors(origin: str) -> dict[str, str]:
    return {
        "access-control-allow-origin": origin,
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
        http=_Protocol,
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

        async def serve() -> None:
            # Whatever ends us, those who wait are told so first.
            with anyio.CancelScope(shield=True):
                await server.serve([listener])

        group.start_soon(serve)
        try:
            at = listener.getsockname()
            name = f"[{at[0]}]" if ":" in at[0] else at[0]
            yield f"http://{name}:{at[1]}"
        finally:
            server.should_exit = True
            if isinstance(app, _Door):
                app.end()


class _Protocol(HttpToolsProtocol):
    """Reads requests, and no head of one without an end: its parser would keep all of it."""

    _head_bytes = 0
    """Received since there was a whole head, a part of a body or the end of a request."""

    def data_received(self, data: bytes) -> None:
        """Take what comes, and go when it is too much of a head."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_SIZE_MAX_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        """Count anew."""
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count anew."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Count anew."""
        self._head_bytes = 0
        super().on_message_complete()


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Catch none."""
        yield


def _listen(host: str, port: int) -> Any:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio sends at once only on connections that say they are TCP,
    # else a part of an answer waits up to 40 ms for the reader's acknowledgement of the last.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
