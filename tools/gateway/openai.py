"""The API of OpenAI: chat, completions, models."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from coase.agents.compute.ports import Chunk, Logprob, Prompt, Usage
from coase.agents.compute.router import Listed, RouterCompute
from coase.protocol.errors import CoaseError

from .common import Answer, Fields, Wrong, begin, body_of, messages_of, new_id, whole, wrong

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
TEMPERATURE_DEFAULT = 1.0
_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {402: "insufficient_quota", 401: "invalid_api_key", 429: "rate_limit_exceeded"}


def error_body(error: Wrong) -> dict[str, Any]:
    """Return an error in this API's shape."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "")
    code = _CODES.get(error.status)
    if error.status == 404 and error.param == "model":
        code = "model_not_found"
    return {
        "error": {
            "message": error.message,
            "type": kind or "invalid_request_error",
            "param": error.param,
            "code": code,
        }
    }


async def models(request: Request) -> Response:
    """Answer ``GET /v1/models``, for clients of Anthropic too."""
    entries = [_model(entry) for entry in await _listed(request)]
    ids = [entry["id"] for entry in entries]
    return JSONResponse(
        {
            "object": "list",
            "data": entries,
            "has_more": False,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
        }
    )


async def model(request: Request) -> Response:
    """Answer ``GET /v1/models/{model}``."""
    router: RouterCompute = request.app.state.router
    try:
        entry = await router.find(request.path_params["model"])
    except CoaseError as error:
        raise wrong(error) from error
    if entry is None:
        raise Wrong(404, "this is no model's name", param="model")
    return JSONResponse(_model(entry))


async def _listed(request: Request) -> list[Listed]:
    router: RouterCompute = request.app.state.router
    try:
        return await router.listed()
    except CoaseError as error:
        raise wrong(error) from error


def _model(entry: Listed) -> dict[str, Any]:
    name = entry.info.name
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "local" if entry.made == "local" else "market",
        # What a client of Anthropic reads.
        "type": "model",
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
    }


async def chat(request: Request) -> Response:
    """Answer ``POST /v1/chat/completions``."""
    fields = Fields(await body_of(request))
    fields.refuse("no model here calls tools", "tools", "functions")
    fields.refuse("only text comes back", "audio")
    fields.refuse("only text comes back", "modalities", harmless=(["text"],))
    prompt = Prompt(
        messages=tuple(messages_of(fields.body.get("messages"), roles=ROLES)),  # type: ignore[arg-type]
        max_tokens=fields.count("max_completion_tokens", "max_tokens"),
        response_schema=_schema(fields.body.get("response_format")),
        logprobs=fields.flag("logprobs"),
        **_common(fields),
    )
    if prompt.logprobs and fields.body.get("top_logprobs"):
        raise Wrong(400, "top_logprobs: only that of the token itself", param="top_logprobs")
    return await _answer(request, fields, prompt, _Chat())


async def completions(request: Request) -> Response:
    """Answer ``POST /v1/completions``."""
    fields = Fields(await body_of(request))
    given = fields.body.get("prompt")
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if not isinstance(given, str) or not given:
        raise Wrong(400, "prompt must be one text that is not empty", param="prompt")
    fields.refuse("is not supported", "echo", "suffix")
    fields.refuse("one answer at a time", "best_of", harmless=(1,))
    prompt = Prompt(
        text=given,
        max_tokens=fields.count("max_tokens"),
        logprobs=fields.body.get("logprobs") not in (None, False),
        **_common(fields),
    )
    return await _answer(request, fields, prompt, _Text())


def _common(fields: Fields) -> dict[str, Any]:
    fields.refuse("one answer at a time", "n", harmless=(1,))
    fields.refuse("is not supported", "logit_bias")
    fields.hint("top_p", neutral=(1,))
    fields.hint("frequency_penalty", "presence_penalty", neutral=(0,))
    fields.hint("reasoning_effort", "verbosity")
    return {
        "model": fields.text("model"),
        "temperature": fields.number("temperature", TEMPERATURE_DEFAULT),
        "seed": fields.seed(),
        "stop": fields.stops("stop"),
    }


def _schema(given: Any) -> dict[str, Any] | None:
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    held = given.get("json_schema") if kind == "json_schema" else None
    schema = held.get("schema") if isinstance(held, dict) else None
    if not isinstance(schema, dict):
        raise Wrong(400, "response_format cannot be read", param="response_format")
    return schema


class _Chat:
    """The shape of a chat."""

    prefix, kind, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any]:
        """Return what opens a stream."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        """Return a piece of a stream."""
        found: dict[str, Any] = {"delta": {"content": chunk.text}}
        if chunk.logprobs:
            found["logprobs"] = self.logprobs(chunk.logprobs)
        return found

    def end(self) -> dict[str, Any]:
        """Return what closes a stream."""
        return {"delta": {}}

    def whole(self, text: str) -> dict[str, Any]:
        """Return a whole answer."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, entries: tuple[Logprob, ...]) -> dict[str, Any]:
        """Return log-probabilities."""
        content = [
            {
                "token": entry.token,
                "logprob": entry.logprob,
                "bytes": list(entry.token.encode("utf-8", "surrogatepass")),
                "top_logprobs": [],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}


class _Text(_Chat):
    """The shape of a plain completion."""

    prefix, kind, part = "cmpl-", "text_completion", "text_completion"

    def first(self) -> dict[str, Any]:
        """Return what opens a stream."""
        return {"text": ""}

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        """Return a piece of a stream."""
        found: dict[str, Any] = {"text": chunk.text}
        if chunk.logprobs:
            found["logprobs"] = self.logprobs(chunk.logprobs)
        return found

    def end(self) -> dict[str, Any]:
        """Return what closes a stream."""
        return {"text": ""}

    def whole(self, text: str) -> dict[str, Any]:
        """Return a whole answer."""
        return {"text": text}

    def logprobs(self, entries: tuple[Logprob, ...]) -> dict[str, Any]:
        """Return log-probabilities."""
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": None,
            "text_offset": [],
        }


async def _answer(request: Request, fields: Fields, prompt: Prompt, shape: _Chat) -> Response:
    stream = fields.flag("stream")
    options = Fields(fields.body.get("stream_options") or {})
    with_usage = options.flag("include_usage")
    answer = await begin(request, request.app.state.router, prompt, fields.ignored)
    head = {
        "id": new_id(shape.prefix),
        "object": shape.part if stream else shape.kind,
        "created": int(time.time()),
        "model": prompt.model or "",
        "system_fingerprint": None,
    }
    if stream:
        return StreamingResponse(
            _events(answer, head, shape, with_usage=with_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", **answer.headers()},
        )
    made = await whole(request, answer)
    choice = {
        "index": 0,
        "logprobs": shape.logprobs(made.logprobs) if made.logprobs else None,
        "finish_reason": made.reason,
        **shape.whole(made.text),
    }
    body = {**head, "choices": [choice], "usage": _usage(made.usage), "coase": answer.origin()}
    return JSONResponse(body, headers=answer.headers())


async def _events(
    answer: Answer, head: dict[str, Any], shape: _Chat, *, with_usage: bool
) -> AsyncIterator[bytes]:
    def event(choice: dict[str, Any] | None, **more: Any) -> bytes:
        choices = []
        if choice is not None:
            choices = [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]
        return _sse({**head, "choices": choices, **more})

    reason = "stop"
    try:
        yield event(shape.first())
        async for chunk in answer.chunks():
            reason = chunk.done_reason or reason
            if chunk.text or chunk.logprobs:
                yield event(shape.piece(chunk))
    except CoaseError as error:
        yield _sse(error_body(wrong(error)))
        return
    yield event({**shape.end(), "finish_reason": reason}, coase=answer.origin())
    if with_usage:
        yield event(None, usage=_usage(answer.usage))
    yield b"data: [DONE]\n\n"


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
    }
