"""An engine of fixed speed behind OpenAI's API, in a process of its own: ``backend.py GAP_MS``.

It prints its address and writes a token every so many milliseconds, however many ask, so that
what a gateway costs can be seen. ``max_tokens`` says how many.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response

MODEL = "fixed"
FIRST_MS = 5


def _event(delta: dict[str, Any], **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": more.pop("reason", None)}
    body = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return b"data: " + json.dumps({**body, "choices": [choice], **more}).encode() + b"\n\n"


async def _tokens(count: int, gap_s: float) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    due_s = loop.time() + FIRST_MS / 1_000
    for _ in range(count):
        await asyncio.sleep(max(due_s - loop.time(), 0))
        due_s += gap_s
        yield _event({"content": "word "})
    usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": count + 5}
    yield _event({}, reason="length", usage=usage)
    yield b"data: [DONE]\n\n"


async def chat(request: Request) -> Response:
    """Write as many tokens as are asked for."""
    body = await request.json()
    count = body.get("max_tokens") or body.get("max_completion_tokens") or 16
    gap_s = request.app.state.gap_s
    return StreamingResponse(_tokens(count, gap_s), media_type="text/event-stream")


async def models(request: Request) -> Response:
    """Name the one model."""
    return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


def application(*, gap_ms: float) -> Starlette:
    """Return the engine, which writes a token every so many milliseconds."""
    app = Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )
    app.state.gap_s = gap_ms / 1_000
    return app


def main() -> None:
    """Serve until killed."""
    app = application(gap_ms=float(sys.argv[1]))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
