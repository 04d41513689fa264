"""The API of OpenAI: chat, completions, embeddings, models."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coase.agents.compute.ports import (
    PENALTY_MAX_PERMILLE,
    TOP_K_MAX,
    TOP_LOGPROBS_MAX,
    Chunk,
    Image,
    Logprob,
    Message,
    Prompt,
    Role,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    Usage,
)
from coase.agents.compute.router import Listed, RouterCompute
from coase.protocol.errors import CoaseError

from .common import (
    Answer,
    Fields,
    Whole,
    Wrong,
    able,
    begin,
    blocks_of,
    body_of,
    embedded,
    headers_of,
    listed,
    new_id,
    not_taken,
    origin_of,
    role_in,
    text_in,
    turns_of,
    whole,
    wrong,
)
from .parts import (
    calls_of,
    chosen,
    dimensions_of,
    functions_of,
    held_in,
    level,
    picture_at,
    schema_of,
    scored_token,
    shortened,
    texts_of,
    with_ids,
)
from .sending import Last, Streamed, json_bytes

ROLES = ("system", "developer", "user", "assistant", "tool")
_PENALTY_MAX = PENALTY_MAX_PERMILLE // 1_000
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
    if error.too_long:
        code = "context_length_exceeded"
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
    entries = [_model(entry) for entry in await listed(request)]
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


def _model(entry: Listed) -> dict[str, Any]:
    name = entry.info.name
    return {
        "id": name,
        "object": "model",
        "created": entry.info.modified_s,
        "owned_by": "local" if entry.made == "local" else "market",
        # What a client of Anthropic reads.
        "type": "model",
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
    }


async def chat(request: Request) -> Response:
    """Answer ``POST /v1/chat/completions``."""
    fields = Fields(await body_of(request))
    fields.refuse("was replaced by tools", "functions", "function_call")
    fields.refuse("only text comes back", "audio")
    fields.refuse("only text comes back", "modalities", harmless=(["text"],))
    tools, choice = _tools(fields)
    common = _common(fields)
    prompt = Prompt(
        messages=messages_in(fields.body.get("messages")),
        max_tokens=fields.count("max_completion_tokens", "max_tokens"),
        response_schema=_schema(fields.body.get("response_format")),
        logprobs=fields.flag("logprobs"),
        top_logprobs=fields.top_logprobs(),
        tools=tools,
        tool_choice=choice,
        thinking=await _thinking(request, fields, str(common["model"])),
        **common,
    )
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
    scored = fields.body.get("logprobs") not in (None, False)
    prompt = Prompt(
        text=given,
        max_tokens=fields.count("max_tokens"),
        logprobs=scored,
        top_logprobs=fields.whole("logprobs", most=TOP_LOGPROBS_MAX) if scored else 0,
        **_common(fields),
    )
    return await _answer(request, fields, prompt, _Text())


async def embeddings(request: Request) -> Response:
    """Answer ``POST /v1/embeddings``."""
    fields = Fields(await body_of(request))
    texts = texts_of(fields.body.get("input"), name="input")
    name, dimensions = fields.text("model"), dimensions_of(fields)
    form = fields.text("encoding_format", "float")
    if form not in ("float", "base64"):
        raise Wrong(400, "encoding_format must be float or base64", param="encoding_format")
    made = await embedded(request, texts, name)
    data = []
    for at, vector in enumerate(made.vectors):
        numbers: Any = shortened(vector, dimensions)
        if form == "base64":
            numbers = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        data.append({"object": "embedding", "index": at, "embedding": numbers})
    tokens = made.usage.input_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    origin = origin_of(made)
    held = {"object": "list", "data": data, "model": made.model, "usage": usage, "coase": origin}
    return JSONResponse(held, headers=headers_of(origin))


def messages_in(value: Any) -> tuple[Message, ...]:
    """Return a conversation out of a body.

    :raises Wrong: if it is none, or holds what nothing here reads
    """
    return tuple(_message(entry, where) for where, entry in turns_of(value))


def _message(entry: dict[str, Any], where: str) -> Message:
    role = role_in(entry, ROLES, where=where)
    texts: list[str] = []
    images: list[Image] = []
    for part in blocks_of(entry.get("content"), where=where):
        match part.get("type"):
            case "text":
                texts.append(text_in(part, where=where))
            case "refusal" if role == "assistant":
                texts.append(text_in(part, where=where, name="refusal"))
            case "image_url" if role != "assistant" and "image_url" in part:
                url = held_in(part, "image_url").get("url") or part["image_url"]
                images.append(picture_at(url, where=where))
            case _:
                raise not_taken(part, where=where)
    fields = Fields(entry)
    calls = calls_of(fields, where=where)
    return Message(
        cast("Role", "system" if role == "developer" else role),
        "".join(texts),
        images=tuple(images),
        thinking=fields.text("reasoning_content", ""),
        tool_calls=calls,
        tool_call_id=fields.text("tool_call_id", ""),
        tool_name=fields.text("name", "") if role == "tool" else "",
    )


def _tools(fields: Fields) -> tuple[tuple[Tool, ...], ToolChoice]:
    tools = functions_of(fields)
    fields.hint("parallel_tool_calls", neutral=(True,))
    given = fields.body.get("tool_choice")
    if given is None:
        return tools, "auto"
    if isinstance(given, dict) and given.get("type") == "function":
        return chosen(tools, held_in(given, "function").get("name")), "required"
    if given not in ("auto", "none", "required"):
        raise Wrong(400, "tool_choice cannot be read", param="tool_choice")
    return tools, cast("ToolChoice", given)


async def _thinking(request: Request, fields: Fields, model: str) -> Thinking:
    """Return how hard to think; for a model that does not, the word is a hint that is ignored."""
    given = held_in(fields.body, "reasoning").get("effort")
    wanted = level(fields.body.get("reasoning_effort") or given, name="reasoning_effort")
    if wanted and not await able(request, model, "thinking"):
        fields.ignored.append("reasoning_effort")
        return None
    return wanted


def _common(fields: Fields) -> dict[str, Any]:
    fields.refuse("one answer at a time", "n", harmless=(1,))
    fields.refuse("is not supported", "logit_bias")
    fields.hint("verbosity")
    top_k = fields.body.get("top_k")  # Not of this API, but all engines know it.
    return {
        "model": fields.text("model"),
        "temperature": fields.number("temperature", TEMPERATURE_DEFAULT),
        "seed": fields.seed(),
        "stop": fields.stops("stop"),
        "top_p_permille": fields.permille("top_p"),
        "min_p_permille": fields.permille("min_p"),
        "top_k": None if top_k in (None, -1) else fields.whole("top_k", most=TOP_K_MAX),
        **{
            f"{name}_permille": fields.permille(name, least=-_PENALTY_MAX, most=_PENALTY_MAX)
            for name in ("frequency_penalty", "presence_penalty")
        },
    }


def _schema(given: Any) -> dict[str, Any] | None:
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise Wrong(400, "response_format cannot be read", param="response_format")
    schema = held_in(given, "json_schema").get("schema")
    return schema_of(schema, name="response_format.json_schema.schema")


class _Chat:
    """The shape of a chat."""

    prefix, kind, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any]:
        """Return what opens a stream."""
        return {"delta": {"role": "assistant", "content": ""}}

    def __init__(self) -> None:
        self._calls = 0

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        """Return a piece of a stream."""
        delta: dict[str, Any] = {}
        if chunk.thinking:
            delta["reasoning_content"] = chunk.thinking
        if chunk.text or not (chunk.thinking or chunk.tool_calls):
            delta["content"] = chunk.text
        if chunk.tool_calls:
            delta["tool_calls"] = _calls(chunk.tool_calls, begin=self._calls)
            self._calls += len(chunk.tool_calls)
        found: dict[str, Any] = {"delta": delta}
        if chunk.logprobs:
            found["logprobs"] = self.logprobs(chunk.logprobs)
        return found

    def end(self) -> dict[str, Any]:
        """Return what closes a stream."""
        return {"delta": {}}

    def whole(self, made: Whole) -> dict[str, Any]:
        """Return a whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": made.text, "refusal": None}
        if made.thinking:
            message["reasoning_content"] = made.thinking
        if made.tool_calls:
            message["content"] = made.text or None
            message["tool_calls"] = _calls(made.tool_calls)
        return {"message": message}

    def logprobs(self, scored: tuple[Logprob, ...]) -> dict[str, Any]:
        """Return log-probabilities."""
        content = [
            {**scored_token(entry), "top_logprobs": [scored_token(other) for other in entry.top]}
            for entry in scored
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

    def whole(self, made: Whole) -> dict[str, Any]:
        """Return a whole answer."""
        return {"text": made.text}

    def logprobs(self, scored: tuple[Logprob, ...]) -> dict[str, Any]:
        """Return log-probabilities."""
        tops = [{other.token: other.logprob for other in entry.top} for entry in scored]
        return {
            "tokens": [entry.token for entry in scored],
            "token_logprobs": [entry.logprob for entry in scored],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": [],
        }


def _calls(calls: tuple[ToolCall, ...], *, begin: int | None = None) -> list[dict[str, Any]]:
    """Return tool calls; with ``begin``, as the parts of a stream, which number them."""
    found: list[dict[str, Any]] = []
    for at, (id_, call) in enumerate(with_ids(calls)):
        function = {"name": call.name, "arguments": call.arguments}
        entry = {"id": id_, "type": "function", "function": function}
        found.append(entry if begin is None else {"index": begin + at, **entry})
    return found


async def _answer(request: Request, fields: Fields, prompt: Prompt, shape: _Chat) -> Response:
    stream = fields.flag("stream")
    given = fields.body.get("stream_options") or {}
    if not isinstance(given, dict):
        raise Wrong(400, "stream_options must be an object", param="stream_options")
    options = Fields(given)
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
        return Streamed(
            _events(answer, head, shape, with_usage=with_usage),
            media_type="text/event-stream",
            headers=answer.headers(),
        )
    made = await whole(request, answer)
    choice = {
        "index": 0,
        "logprobs": shape.logprobs(made.logprobs) if made.logprobs else None,
        "finish_reason": made.reason,
        **shape.whole(made),
    }
    body = {**head, "choices": [choice], "usage": _usage(made.usage), "coase": answer.origin()}
    return JSONResponse(body, headers=answer.headers())


async def _events(
    answer: Answer, head: dict[str, Any], shape: _Chat, *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    usual = {"index": 0, "logprobs": None, "finish_reason": None}
    # Nearly all events are alike but for their text; what they share is written once.
    begun = _sse({**head, "choices": [usual]}).removesuffix(b"}]}\n\n")

    def event(choice: dict[str, Any]) -> bytes:
        if choice.keys() & usual.keys():
            return _sse({**head, "choices": [{**usual, **choice}]})
        return b"%b,%b]}\n\n" % (begun, json_bytes(choice)[1:])

    # What opens the stream leaves with the first piece, which is there already.
    reason, before = "stop", event(shape.first())
    try:
        async for chunk in answer.chunks():
            reason = chunk.done_reason or reason
            said = chunk.text or chunk.logprobs or chunk.thinking or chunk.tool_calls
            if said or before:
                yield before + (event(shape.piece(chunk)) if said else b"")
                before = b""
    except CoaseError as error:
        yield Last(_sse(error_body(wrong(error))))
        return
    last = {**usual, **shape.end(), "finish_reason": reason}
    end = [_sse({**head, "choices": [last], "coase": answer.origin()})]
    if with_usage:
        end.append(_sse({**head, "choices": [], "usage": _usage(answer.usage)}))
    yield Last(b"".join((*end, b"data: [DONE]\n\n")))


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json_bytes(body)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
    }
