"""The API of Anthropic: messages, and counting their tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coase.agents.compute.ports import (
    TOP_K_MAX,
    Image,
    Message,
    Prompt,
    Role,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    Usage,
)
from coase.agents.compute.router import RouterCompute
from coase.protocol.errors import CoaseError

from .common import (
    Answer,
    Fields,
    Whole,
    Wrong,
    begin,
    blocks_of,
    body_of,
    new_id,
    not_taken,
    role_in,
    text_in,
    text_of,
    turns_of,
    whole,
    wrong,
)
from .parts import (
    called,
    chosen,
    entries,
    held_in,
    level,
    picture,
    picture_at,
    schema_of,
    tool_of,
    with_ids,
)
from .sending import Last, Streamed, json_bytes

ROLES = ("user", "assistant", "system")
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
_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def error_body(error: Wrong) -> dict[str, Any]:
    """Return an error in this API's shape."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "")
    message = f"prompt is too long: {error.message}" if error.too_long else error.message
    return {
        "type": "error",
        "error": {"type": kind or "invalid_request_error", "message": message},
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
        events = _events(answer, head)
        return Streamed(events, media_type="text/event-stream", headers=answer.headers())
    made = await whole(request, answer)
    body = {
        **head,
        "content": _content(made),
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


def _content(made: Whole) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if made.thinking:
        blocks.append({"type": "thinking", "thinking": made.thinking, "signature": ""})
    if made.text or not made.tool_calls:
        blocks.append({"type": "text", "text": made.text})
    for id_, call in with_ids(made.tool_calls):
        blocks.append(
            {"type": "tool_use", "id": id_, "name": call.name, "input": call.read() or {}}
        )
    return blocks


def _prompt(fields: Fields, *, max_tokens: int) -> Prompt:
    fields.refuse("is not supported", "mcp_servers", "container")
    system = text_of(fields.body.get("system"), where="system")
    head = [Message("system", system)] if system else []
    for where, entry in turns_of(fields.body.get("messages")):
        head += _turns(entry, where)
    tools, choice = _tools(fields)
    top_k = fields.body.get("top_k")
    return Prompt(
        messages=tuple(head),
        model=fields.text("model"),
        max_tokens=max_tokens,
        temperature=fields.number("temperature", TEMPERATURE_DEFAULT, most=1),
        stop=fields.stops("stop_sequences"),
        tools=tools,
        tool_choice=choice,
        thinking=_thinking(fields),
        response_schema=_schema(fields),
        top_p_permille=fields.permille("top_p"),
        top_k=None if top_k is None else fields.whole("top_k", most=TOP_K_MAX),
    )


def _turns(entry: dict[str, Any], where: str) -> list[Message]:
    """Return a message; the results of tools in it are turns of their own, before the rest."""
    role = cast("Role", role_in(entry, ROLES, where=where))
    results: list[Message] = []
    texts: list[str] = []
    thoughts: list[str] = []
    images: list[Image] = []
    calls: list[ToolCall] = []
    for part in blocks_of(entry.get("content"), where=where):
        match part.get("type"), role:
            case "text", _:
                texts.append(text_in(part, where=where))
            case "image", "user":
                images.append(_picture(part, where))
            case "tool_result", "user":
                results.append(_result(part, where))
            case "tool_use", "assistant":
                given = held_in(part, "input")
                calls.append(called(part.get("name"), given, id_=part.get("id"), where=where))
            case "thinking", "assistant":
                thoughts.append(text_in(part, where=where, name="thinking"))
            case "redacted_thinking", "assistant":
                pass  # Nobody but its maker can read it.
            case _:
                raise not_taken(part, where=where)
    if results and not texts and not images:
        return results
    said = Message(
        role,
        "".join(texts),
        images=tuple(images),
        thinking="".join(thoughts),
        tool_calls=tuple(calls),
    )
    return [*results, said]


def _picture(part: dict[str, Any], where: str) -> Image:
    source = held_in(part, "source")
    if source.get("type") == "url":
        return picture_at(source.get("url"), where=where)
    if source.get("type") != "base64":
        raise Wrong(400, f"{where}: an image must come as base64", param=where)
    return picture(source.get("data"), where=where)


def _result(part: dict[str, Any], where: str) -> Message:
    texts: list[str] = []
    images: list[Image] = []
    for inner in blocks_of(part.get("content"), where=where):
        if inner.get("type") == "image":
            images.append(_picture(inner, where))
        elif inner.get("type") == "text":
            texts.append(text_in(inner, where=where))
        else:
            raise not_taken(inner, where=where)
    id_ = part.get("tool_use_id")
    if not isinstance(id_, str):
        raise Wrong(400, f"{where}: a tool_result has no tool_use_id", param=where)
    failed = "error: " if part.get("is_error") is True else ""
    return Message("tool", failed + "".join(texts), images=tuple(images), tool_call_id=id_)


def _tools(fields: Fields) -> tuple[tuple[Tool, ...], ToolChoice]:
    found: list[Tool] = []
    for at, entry in entries(fields, "tools"):
        where = f"tools[{at}]"
        if entry.get("type") not in (None, "custom"):
            why = f"{where}: tools that the server runs are not here, only your own"
            raise Wrong(400, why, param=where)
        found.append(tool_of(entry, schema="input_schema", where=where))
    tools = tuple(found)
    choice = held_in(fields.body, "tool_choice")
    if choice.get("disable_parallel_tool_use"):
        fields.ignored.append("disable_parallel_tool_use")
    match choice.get("type", "auto"):
        case "tool":
            return chosen(tools, choice.get("name")), "required"
        case "any":
            return tools, "required"
        case "auto":
            return tools, "auto"
        case "none":
            return tools, "none"
    raise Wrong(400, "tool_choice cannot be read", param="tool_choice")


def _thinking(fields: Fields) -> Thinking:
    given = held_in(fields.body, "thinking").get("type")
    effort = held_in(fields.body, "output_config").get("effort")
    match given:
        case "disabled":
            return False
        case "enabled":
            return level(effort, name="output_config.effort") or True
        case None | "adaptive":
            return None
    raise Wrong(400, "thinking cannot be read", param="thinking")


def _schema(fields: Fields) -> dict[str, Any] | None:
    """Return the schema of the answer, under its present name or that of before."""
    body = fields.body
    form = held_in(held_in(body, "output_config"), "format") or held_in(body, "output_format")
    if not form:
        return None
    if form.get("type") != "json_schema":
        raise Wrong(400, "output_config.format cannot be read", param="output_config")
    return schema_of(form.get("schema"), name="output_config.format.schema")


class _Blocks:
    """Says when one block of a streamed answer ends and another begins."""

    def __init__(self) -> None:
        self._open = ""
        self._index = -1

    def delta(self, kind: str, opening: dict[str, Any], delta: dict[str, Any]) -> list[bytes]:
        """Return what goes on, or begins, a block of this kind."""
        events: list[bytes] = []
        if self._open != kind:
            events += self.end()
            self._open, self._index = kind, self._index + 1
            events.append(_event("content_block_start", index=self._index, content_block=opening))
        return [*events, _event("content_block_delta", index=self._index, delta=delta)]

    def end(self) -> list[bytes]:
        """Return what ends the block that is open."""
        if not self._open:
            return []
        self._open = ""
        return [_event("content_block_stop", index=self._index)]

    def text(self, text: str) -> list[bytes]:
        """Return a piece of text."""
        opening = {"type": "text", "text": ""}
        return self.delta("text", opening, {"type": "text_delta", "text": text})

    def thinking(self, text: str) -> list[bytes]:
        """Return a piece of thinking."""
        opening = {"type": "thinking", "thinking": "", "signature": ""}
        return self.delta("thinking", opening, {"type": "thinking_delta", "thinking": text})

    def call(self, id_: str, call: ToolCall) -> list[bytes]:
        """Return a whole tool call."""
        opening = {"type": "tool_use", "id": id_, "name": call.name, "input": {}}
        arguments = json.dumps(call.read() or {}, ensure_ascii=False)
        delta = {"type": "input_json_delta", "partial_json": arguments}
        return [*self.end(), *self.delta("tool_use", opening, delta), *self.end()]


async def _events(answer: Answer, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    empty = Usage(input_tokens=0, output_tokens=0)
    opening = {**head, "content": [], "stop_reason": None, "stop_sequence": None}
    # What opens the stream leaves with the first piece, which is there already.
    before = [_event("message_start", message={**opening, "usage": _usage(empty)})]
    blocks, reason, said = _Blocks(), "stop", False
    try:
        async for chunk in answer.chunks():
            reason = chunk.done_reason or reason
            events = blocks.thinking(chunk.thinking) if chunk.thinking else []
            events += blocks.text(chunk.text) if chunk.text else []
            for id_, call in with_ids(chunk.tool_calls):
                events += blocks.call(id_, call)
            said = said or bool(events)
            if events or before:
                yield b"".join((*before, *events))
                before = []
    except CoaseError as error:
        body = error_body(wrong(error))
        yield Last(_event("error", error=body["error"]))
        return
    # Clients expect a block, be it an empty one.
    end = blocks.end() if said else [*blocks.text(""), *blocks.end()]
    delta = {"stop_reason": _STOPS.get(reason, "end_turn"), "stop_sequence": None}
    usage, origin = _usage(answer.usage), answer.origin()
    end.append(_event("message_delta", delta=delta, usage=usage, coase=origin))
    yield Last(b"".join((*end, _event("message_stop"))))


def _event(kind: str, **body: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json_bytes({"type": kind, **body}))


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens - usage.cached_input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_input_tokens": usage.cached_input_tokens,
        "cache_creation_input_tokens": 0,
    }
