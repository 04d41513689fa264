"""The API of Ollama: chat, generate, embed, and what its clients ask about models."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from coase.agents.compute.ports import (
    PENALTY_MAX_PERMILLE,
    TOP_K_MAX,
    Chunk,
    Image,
    Message,
    Prompt,
    Role,
    ToolCall,
)
from coase.agents.compute.router import Listed, RouterCompute
from coase.protocol.errors import CoaseError

from .common import (
    Answer,
    Fields,
    Wrong,
    begin,
    body_of,
    embedded,
    headers_of,
    listed,
    origin_of,
    role_in,
    text_of,
    turns_of,
    whole,
    wrong,
)
from .parts import (
    calls_of,
    dimensions_of,
    functions_of,
    level,
    picture,
    scored_token,
    shortened,
    texts_of,
    with_ids,
)
from .sending import Last, Streamed, json_bytes

# Clients compare it to the version that brought what they want to use. What is served here is
# what this one had: tools, thinking at levels, log-probabilities.
VERSION: Final = "0.12.11"
ROLES: Final = ("system", "user", "assistant", "tool")
TEMPERATURE_DEFAULT: Final = 0.8
LOADED_FOR: Final = timedelta(minutes=5)
# Ollama has the time of the file here; nobody tells it of a model that is elsewhere.
_EPOCH: Final = "1970-01-01T00:00:00Z"
_MS_NS: Final = 1_000_000


def error_body(error: Wrong) -> dict[str, Any]:
    """Return an error in this API's shape."""
    return {"error": error.message}


async def root(request: Request) -> Response:
    """Answer ``GET /`` and ``HEAD /`` as clients expect of a server that is there."""
    return PlainTextResponse("Ollama is running")


async def version(request: Request) -> Response:
    """Answer ``GET /api/version``."""
    return JSONResponse({"version": VERSION})


async def tags(request: Request) -> Response:
    """Answer ``GET /api/tags``."""
    models = [{**_entry(entry), "modified_at": _changed(entry)} for entry in await listed(request)]
    return JSONResponse({"models": models})


async def ps(request: Request) -> Response:
    """Answer ``GET /api/ps``: the models of this machine that are not said to be unloaded."""
    expires = (datetime.now(UTC) + LOADED_FOR).isoformat()
    found = [
        {
            **_entry(entry),
            "expires_at": expires,
            "size_vram": 0,
            "context_length": entry.info.context_tokens,
        }
        for entry in await listed(request)
        if entry.made == "local" and entry.info.loaded is not False
    ]
    return JSONResponse({"models": found})


async def show(request: Request) -> Response:
    """Answer ``POST /api/show``."""
    fields = Fields(await body_of(request))
    name = fields.text("model", "") or fields.text("name", "")
    router: RouterCompute = request.app.state.router
    try:
        entry = await router.find(name)
    except CoaseError as error:
        raise _renamed(wrong(error), name) from error
    if entry is None:
        raise Wrong(400, "model is required", param="model")
    return JSONResponse(
        {
            "license": "",
            "modelfile": f"FROM {entry.info.name}\n",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": _details(entry),
            "model_info": _facts(entry),
            "tensors": [],
            "capabilities": list(entry.info.capabilities),
            "modified_at": _changed(entry),
        }
    )


def _entry(entry: Listed) -> dict[str, Any]:
    """Return what every list of models says of one."""
    info = entry.info
    return {
        "name": info.name,
        "model": info.name,
        "size": info.size_bytes,
        # Ollama's own program shows the first twelve letters, and breaks where there are none.
        "digest": info.digest or sha256(info.name.encode()).hexdigest(),
        "details": _details(entry),
    }


def _facts(entry: Listed) -> dict[str, Any]:
    info = entry.info
    family = info.family or "coase"
    told = {
        "general.architecture": family,
        "general.basename": info.name,
        "general.parameter_count": info.parameter_count,
        f"{family}.context_length": info.context_tokens,
        f"{family}.embedding_length": info.embedding_length,
    }
    return {key: value for key, value in told.items() if value}


def _changed(entry: Listed) -> str:
    if not entry.info.modified_s:
        return _EPOCH
    return datetime.fromtimestamp(entry.info.modified_s, UTC).isoformat().replace("+00:00", "Z")


def _details(entry: Listed) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf" if entry.made == "local" else "",
        "family": entry.info.family,
        "families": [entry.info.family] if entry.info.family else None,
        "parameter_size": entry.info.parameter_size,
        "quantization_level": entry.info.quantisation,
    }


async def chat(request: Request) -> Response:
    """Answer ``POST /api/chat``."""
    fields = Fields(await body_of(request))
    name = fields.text("model")
    if not fields.body.get("messages"):
        return await _loaded(request, fields, name, {"message": _message("")})
    messages = tuple(_turn(entry, where) for where, entry in turns_of(fields.body["messages"]))
    prompt = Prompt(messages=messages, tools=functions_of(fields), **_common(fields, name))
    return await _answer(request, fields, prompt, chat_shape)


async def generate(request: Request) -> Response:
    """Answer ``POST /api/generate``."""
    fields = Fields(await body_of(request))
    name = fields.text("model")
    fields.refuse("is not supported", "suffix", "template", "context")
    text, images = fields.text("prompt", ""), _images(fields, "images")
    if not text and not images:
        return await _loaded(request, fields, name, {"response": ""})
    common = _common(fields, name)
    if fields.flag("raw"):
        fields.refuse("cannot be with raw", "images")
        prompt = Prompt(text=text, **common)
    else:
        system = fields.text("system", "")
        head = (Message("system", system),) if system else ()
        asked = Message("user", text, images=images)
        prompt = Prompt(messages=(*head, asked), **common)
    return await _answer(request, fields, prompt, generate_shape)


async def embed(request: Request) -> Response:
    """Answer ``POST /api/embed``."""
    begun_ns = time.monotonic_ns()
    fields = Fields(await body_of(request))
    name, dimensions = fields.text("model"), dimensions_of(fields)
    texts = texts_of(fields.body.get("input") or [], name="input")
    if not any(texts):
        await _find(request, name)
        return JSONResponse({"model": name, "embeddings": []})
    try:
        made = await embedded(request, texts, name)
    except Wrong as error:
        raise _renamed(error, name) from error
    vectors = [shortened(vector, dimensions) for vector in made.vectors]
    worked_ns = min(made.usage.duration_ms * _MS_NS, time.monotonic_ns() - begun_ns)
    return JSONResponse(
        {
            "model": name,
            "embeddings": vectors,
            "total_duration": time.monotonic_ns() - begun_ns,
            "load_duration": time.monotonic_ns() - begun_ns - worked_ns,
            "prompt_eval_count": made.usage.input_tokens,
            "coase": (origin := origin_of(made)),
        },
        headers=headers_of(origin),
    )


async def embeddings(request: Request) -> Response:
    """Answer ``POST /api/embeddings``, the older word for one text."""
    fields = Fields(await body_of(request))
    name, text = fields.text("model"), fields.text("prompt", "")
    if not text:
        await _find(request, name)
        return JSONResponse({"embedding": []})
    try:
        made = await embedded(request, [text], name)
    except Wrong as error:
        raise _renamed(error, name) from error
    origin = origin_of(made)
    held = {"embedding": list(made.vectors[0]), "coase": origin}
    return JSONResponse(held, headers=headers_of(origin))


def _turn(entry: dict[str, Any], where: str) -> Message:
    fields = Fields(entry)
    return Message(
        cast("Role", role_in(entry, ROLES, where=where)),
        text_of(entry.get("content"), where=where),
        images=_images(fields, "images", where=where),
        thinking=fields.text("thinking", ""),
        tool_calls=calls_of(fields, where=where),
        tool_call_id=fields.text("tool_call_id", ""),
        tool_name=fields.text("tool_name", ""),
    )


def _images(fields: Fields, name: str, *, where: str = "images") -> tuple[Image, ...]:
    given = fields.body.get(name) or []
    if not isinstance(given, list):
        raise Wrong(400, f"{where}: images must be a list", param=where)
    return tuple(picture(encoded, where=where) for encoded in given)


def _common(fields: Fields, name: str) -> dict[str, Any]:
    given = fields.body.get("options") or {}
    if not isinstance(given, dict):
        raise Wrong(400, "options must be an object", param="options")
    options = Fields(given, fields.ignored)
    options.hint(*"typical_p repeat_last_n num_ctx num_keep mirostat".split())
    form = fields.body.get("format")
    if form not in (None, "", "json") and not isinstance(form, dict):
        raise Wrong(400, 'format must be "json" or a JSON schema', param="format")
    schema = form if isinstance(form, dict) else {"type": "object"} if form == "json" else None
    most = PENALTY_MAX_PERMILLE // 1_000
    return {
        "model": name,
        "max_tokens": options.count("num_predict"),
        "temperature": options.number("temperature", TEMPERATURE_DEFAULT),
        "seed": options.seed(),
        "stop": options.stops("stop"),
        "response_schema": schema,
        "logprobs": fields.flag("logprobs"),
        "top_logprobs": fields.top_logprobs(),
        "thinking": level(fields.body.get("think"), name="think"),
        "top_k": None if "top_k" not in given else options.whole("top_k", most=TOP_K_MAX),
        "top_p_permille": options.permille("top_p"),
        "min_p_permille": options.permille("min_p"),
        "repeat_penalty_permille": options.permille("repeat_penalty", most=most),
        "frequency_penalty_permille": options.permille("frequency_penalty", least=-most, most=most),
        "presence_penalty_permille": options.permille("presence_penalty", least=-most, most=most),
    }


async def _find(request: Request, name: str) -> None:
    router: RouterCompute = request.app.state.router
    try:
        await router.find(name)
    except CoaseError as error:
        raise _renamed(wrong(error), name) from error


async def _loaded(request: Request, fields: Fields, name: str, content: dict[str, Any]) -> Response:
    """Answer a request without a prompt, by which clients load and unload models."""
    await _find(request, name)
    reason = "unload" if fields.body.get("keep_alive") in (0, "0", "0s") else "load"
    return JSONResponse(
        {"model": name, "created_at": _now(), **content, "done": True, "done_reason": reason}
    )


Shape = Callable[[Chunk], dict[str, Any]]


def chat_shape(chunk: Chunk) -> dict[str, Any]:
    """Return a piece of a chat."""
    message = _message(chunk.text)
    if chunk.thinking:
        message["thinking"] = chunk.thinking
    if chunk.tool_calls:
        message["tool_calls"] = _calls(chunk.tool_calls)
    return {"message": message}


def generate_shape(chunk: Chunk) -> dict[str, Any]:
    """Return a piece of a plain answer."""
    return {"response": chunk.text, **({"thinking": chunk.thinking} if chunk.thinking else {})}


def _calls(calls: tuple[ToolCall, ...]) -> list[dict[str, Any]]:
    return [
        {"id": id_, "function": {"index": at, "name": call.name, "arguments": call.read() or {}}}
        for at, (id_, call) in enumerate(with_ids(calls))
    ]


async def _answer(request: Request, fields: Fields, prompt: Prompt, shape: Shape) -> Response:
    name = prompt.model or ""
    try:
        answer = await begin(request, request.app.state.router, prompt, fields.ignored)
    except Wrong as error:
        raise _renamed(error, name) from error
    if fields.flag("stream", True):
        lines = _lines(answer, name, shape)
        return Streamed(lines, media_type="application/x-ndjson", headers=answer.headers())
    made = await whole(request, answer)
    last = Chunk(done=True, done_reason="length" if made.reason == "length" else "stop")
    said = replace(last, text=made.text, thinking=made.thinking, tool_calls=made.tool_calls)
    body = _part(name, replace(said, logprobs=made.logprobs), shape)
    return JSONResponse({**body, **_metrics(answer)}, headers=answer.headers())


async def _lines(answer: Answer, name: str, shape: Shape) -> AsyncGenerator[bytes, None]:
    def says(chunk: Chunk) -> bool:
        return bool(chunk.text or chunk.logprobs or chunk.thinking or chunk.tool_calls)

    try:
        async for chunk in answer.chunks():
            line = b""
            if says(chunk):
                said = replace(chunk, done=False) if chunk.done else chunk
                line = _line(_part(name, said, shape))
            if chunk.done:
                last = Chunk(done=True, done_reason=chunk.done_reason)
                line += _line({**_part(name, last, shape), **_metrics(answer)})
                yield Last(line)
            elif line:
                yield line
    except CoaseError as error:
        yield Last(_line(error_body(wrong(error))))


def _part(name: str, chunk: Chunk, shape: Shape) -> dict[str, Any]:
    found = {"model": name, "created_at": _now(), **shape(chunk), "done": chunk.done}
    if chunk.done:
        found["done_reason"] = "length" if chunk.done_reason == "length" else "stop"
    if chunk.logprobs:
        found["logprobs"] = [
            {**scored_token(entry), "top_logprobs": [scored_token(other) for other in entry.top]}
            if entry.top
            else scored_token(entry)
            for entry in chunk.logprobs
        ]
    return found


def _metrics(answer: Answer) -> dict[str, Any]:
    usage, elapsed_ns = answer.usage, answer.elapsed_ns
    worked_ns = min(usage.duration_ms * _MS_NS, elapsed_ns)
    return {
        "total_duration": elapsed_ns,
        "load_duration": elapsed_ns - worked_ns,
        "prompt_eval_count": usage.input_tokens,
        "prompt_eval_duration": 0,
        "eval_count": usage.output_tokens,
        "eval_duration": worked_ns,
        "coase": answer.origin(),
    }


def _message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _line(body: dict[str, Any]) -> bytes:
    return json_bytes(body) + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _renamed(error: Wrong, name: str) -> Wrong:
    """Return the error in the words by which clients know that a model is not there."""
    if error.status != 404:
        return error
    return Wrong(404, f"model {name!r} not found: {error.message}", param="model")
