"""The API of Anthropic: messages, and counting their tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from coase.agents.compute.ports import Message, Prompt, Usage
from coase.agents.compute.router import RouterCompute
from coase.protocol.errors import CoaseError

from .common import (
    Answer,
    Fields,
    Wrong,
    begin,
    body_of,
    messages_of,
    new_id,
    text_of,
    whole,
    wrong,
)

ROLES = {"user": "user", "assistant": "assistant"}
TEMPERATURE_DEFAULT = 1.0
_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOPS = {"stop": "end_turn", "length": "max_tokens"}


def error_body(error: Wrong) -> dict[str, Any]:
    """Return an error in this API's shape."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "")
    return {
        "type": "error",
        "error": {"type": kind or "invalid_request_error", "message": error.message},
        "request_id": None,
    }


async def messages(request: Request) -> Response:
    """Answer ``POST /v1/messages``."""
    fields = Fields(await body_of(request))
    prompt = _prompt(fields, max_tokens=_required(fields))
    answer = await begin(request, request.app.state.router, prompt, fields.ignored)
    head: dict[str, Any] = {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": prompt.model,
    }
    if fields.flag("stream"):
        return StreamingResponse(
            _events(answer, head),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", **answer.headers()},
        )
    made = await whole(request, answer)
    body = {
        **head,
        "content": [{"type": "text", "text": made.text}],
        "stop_reason": _STOPS.get(made.reason, "end_turn"),
        "stop_sequence": None,
        "usage": _usage(made.usage),
        "coase": answer.origin(),
    }
    return JSONResponse(body, headers=answer.headers())


async def count_tokens(request: Request) -> Response:
    """Answer ``POST /v1/messages/count_tokens``, by a guess where no tokenizer is here."""
    fields = Fields(await body_of(request))
    router: RouterCompute = request.app.state.router
    try:
        estimate = await router.estimate(_prompt(fields, max_tokens=1))
    except CoaseError as error:
        raise wrong(error) from error
    return JSONResponse({"input_tokens": estimate.input_tokens})


def _required(fields: Fields) -> int:
    if fields.body.get("max_tokens") is None:
        raise Wrong(400, "max_tokens: field required", param="max_tokens")
    return fields.count("max_tokens")


def _prompt(fields: Fields, *, max_tokens: int) -> Prompt:
    fields.refuse("no model here calls tools", "tools")
    fields.refuse("is not supported", "mcp_servers", "container")
    thinking = fields.body.get("thinking")
    if isinstance(thinking, dict) and thinking.get("type") != "disabled":
        raise Wrong(400, "thinking: no model here thinks aloud", param="thinking")
    fields.hint("top_k", "top_p")
    system = text_of(fields.body.get("system"), where="system")
    head = [Message("system", system)] if system else []
    found = messages_of(fields.body.get("messages"), roles=ROLES)  # type: ignore[arg-type]
    return Prompt(
        messages=(*head, *found),
        model=fields.text("model"),
        max_tokens=max_tokens,
        temperature=fields.number("temperature", TEMPERATURE_DEFAULT, most=1),
        stop=fields.stops("stop_sequences"),
    )


async def _events(answer: Answer, head: dict[str, Any]) -> AsyncIterator[bytes]:
    empty = Usage(input_tokens=0, output_tokens=0)
    opening = {**head, "content": [], "stop_reason": None, "stop_sequence": None}
    yield _event("message_start", message={**opening, "usage": _usage(empty)})
    yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    reason = "stop"
    try:
        async for chunk in answer.chunks():
            reason = chunk.done_reason or reason
            if chunk.text:
                delta = {"type": "text_delta", "text": chunk.text}
                yield _event("content_block_delta", index=0, delta=delta)
    except CoaseError as error:
        body = error_body(wrong(error))
        yield _event("error", error=body["error"])
        return
    yield _event("content_block_stop", index=0)
    yield _event(
        "message_delta",
        delta={"stop_reason": _STOPS.get(reason, "end_turn"), "stop_sequence": None},
        usage=_usage(answer.usage),
        coase=answer.origin(),
    )
    yield _event("message_stop")


def _event(kind: str, **body: Any) -> bytes:
    data = json.dumps({"type": kind, **body}, ensure_ascii=False).encode("utf-8", "replace")
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens - usage.cached_input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_input_tokens": usage.cached_input_tokens,
        "cache_creation_input_tokens": 0,
    }
