"""The API of Ollama: chat, generate, and what its clients ask about models."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from coase.agents.compute.ports import Chunk, Logprob, Message, Prompt
from coase.agents.compute.router import Listed, RouterCompute
from coase.protocol.errors import CoaseError

from .common import Answer, Fields, Wrong, begin, body_of, messages_of, whole, wrong

# Clients compare it to the version that brought what they want to use. What is served here is
# what this one had, as far as models without tools and images go.
VERSION: Final = "0.12.0"
ROLES: Final = {"system": "system", "user": "user", "assistant": "assistant"}
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
    entries = []
    for entry in await _listed(request):
        entries.append(
            {
                "name": entry.info.name,
                "model": entry.info.name,
                "modified_at": _EPOCH,
                "size": entry.info.size_bytes,
                "digest": entry.info.digest,
                "details": _details(entry),
            }
        )
    return JSONResponse({"models": entries})


async def ps(request: Request) -> Response:
    """Answer ``GET /api/ps``: the models of this machine that are not said to be unloaded."""
    expires = (datetime.now(UTC) + LOADED_FOR).isoformat()
    entries = []
    for entry in await _listed(request):
        if entry.made == "local" and entry.info.loaded is not False:
            entries.append(
                {
                    "name": entry.info.name,
                    "model": entry.info.name,
                    "size": entry.info.size_bytes,
                    "digest": entry.info.digest,
                    "details": _details(entry),
                    "expires_at": expires,
                    "size_vram": 0,
                    "context_length": entry.info.context_tokens,
                }
            )
    return JSONResponse({"models": entries})


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
    info: dict[str, Any] = {"general.architecture": "coase", "general.basename": entry.info.name}
    if entry.info.context_tokens:
        info["coase.context_length"] = entry.info.context_tokens
    return JSONResponse(
        {
            "license": "",
            "modelfile": f"FROM {entry.info.name}\n",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": _details(entry),
            "model_info": info,
            "capabilities": ["completion"],
            "modified_at": _EPOCH,
        }
    )


async def _listed(request: Request) -> list[Listed]:
    router: RouterCompute = request.app.state.router
    try:
        return await router.listed()
    except CoaseError as error:
        raise wrong(error) from error


def _details(entry: Listed) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf" if entry.made == "local" else "",
        "family": "",
        "families": [],
        "parameter_size": "",
        "quantization_level": entry.info.quantisation,
    }


async def chat(request: Request) -> Response:
    """Answer ``POST /api/chat``."""
    fields = Fields(await body_of(request))
    name = fields.text("model")
    _refuse(fields, name)
    if not fields.body.get("messages"):
        return await _loaded(request, fields, name, {"message": _message("")})
    messages = messages_of(fields.body["messages"], roles=ROLES)  # type: ignore[arg-type]
    prompt = Prompt(messages=tuple(messages), **_common(fields, name))
    return await _answer(request, fields, prompt, chat_shape)


async def generate(request: Request) -> Response:
    """Answer ``POST /api/generate``."""
    fields = Fields(await body_of(request))
    name = fields.text("model")
    _refuse(fields, name)
    fields.refuse("is not supported", "suffix", "template", "context")
    text = fields.text("prompt", "")
    if not text:
        return await _loaded(request, fields, name, {"response": ""})
    common = _common(fields, name)
    if fields.flag("raw"):
        prompt = Prompt(text=text, **common)
    else:
        system = fields.text("system", "")
        head = (Message("system", system),) if system else ()
        prompt = Prompt(messages=(*head, Message("user", text)), **common)
    return await _answer(request, fields, prompt, generate_shape)


def _refuse(fields: Fields, name: str) -> None:
    fields.refuse(f"{name!r} does not support tools", "tools")
    fields.refuse(f"{name!r} does not support thinking", "think")
    fields.refuse(f"{name!r} does not take images", "images")
    if fields.body.get("top_logprobs"):
        raise Wrong(400, "top_logprobs: only that of the token itself", param="top_logprobs")


def _common(fields: Fields, name: str) -> dict[str, Any]:
    given = fields.body.get("options") or {}
    if not isinstance(given, dict):
        raise Wrong(400, "options must be an object", param="options")
    options = Fields(given, fields.ignored)
    options.hint(
        *"top_k top_p min_p typical_p repeat_last_n repeat_penalty".split(),
        *"presence_penalty frequency_penalty num_ctx num_keep mirostat".split(),
    )
    form = fields.body.get("format")
    if form not in (None, "", "json") and not isinstance(form, dict):
        raise Wrong(400, 'format must be "json" or a JSON schema', param="format")
    schema = form if isinstance(form, dict) else {"type": "object"} if form == "json" else None
    return {
        "model": name,
        "max_tokens": options.count("num_predict"),
        "temperature": options.number("temperature", TEMPERATURE_DEFAULT),
        "seed": options.seed(),
        "stop": options.stops("stop"),
        "response_schema": schema,
        "logprobs": fields.flag("logprobs"),
    }


async def _loaded(request: Request, fields: Fields, name: str, content: dict[str, Any]) -> Response:
    """Answer a request without a prompt, by which clients load and unload models."""
    router: RouterCompute = request.app.state.router
    try:
        await router.find(name)
    except CoaseError as error:
        raise _renamed(wrong(error), name) from error
    reason = "unload" if fields.body.get("keep_alive") in (0, "0", "0s") else "load"
    return JSONResponse(
        {"model": name, "created_at": _now(), **content, "done": True, "done_reason": reason}
    )


def chat_shape(text: str) -> dict[str, Any]:
    """Return a piece of a chat."""
    return {"message": _message(text)}


def generate_shape(text: str) -> dict[str, Any]:
    """Return a piece of a plain answer."""
    return {"response": text}


async def _answer(request: Request, fields: Fields, prompt: Prompt, shape: Any) -> Response:
    name = prompt.model or ""
    try:
        answer = await begin(request, request.app.state.router, prompt, fields.ignored)
    except Wrong as error:
        raise _renamed(error, name) from error
    if fields.flag("stream", True):
        return StreamingResponse(
            _lines(answer, name, shape),
            media_type="application/x-ndjson",
            headers={"cache-control": "no-store", **answer.headers()},
        )
    made = await whole(request, answer)
    last = Chunk(done=True, done_reason="length" if made.reason == "length" else "stop")
    body = _part(name, replace(last, text=made.text, logprobs=made.logprobs), shape)
    return JSONResponse({**body, **_metrics(answer)}, headers=answer.headers())


async def _lines(answer: Answer, name: str, shape: Any) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.chunks():
            if chunk.done and (chunk.text or chunk.logprobs):
                yield _line(_part(name, replace(chunk, done=False), shape))
                chunk = replace(chunk, text="", logprobs=())
            if chunk.done:
                yield _line({**_part(name, chunk, shape), **_metrics(answer)})
            elif chunk.text or chunk.logprobs:
                yield _line(_part(name, chunk, shape))
    except CoaseError as error:
        yield _line(error_body(wrong(error)))


def _part(name: str, chunk: Chunk, shape: Any) -> dict[str, Any]:
    found = {"model": name, "created_at": _now(), **shape(chunk.text), "done": chunk.done}
    if chunk.done:
        found["done_reason"] = chunk.done_reason or "stop"
    if chunk.logprobs:
        found["logprobs"] = [_logprob(entry) for entry in chunk.logprobs]
    return found


def _logprob(entry: Logprob) -> dict[str, Any]:
    encoded = list(entry.token.encode("utf-8", "surrogatepass"))
    return {"token": entry.token, "logprob": entry.logprob, "bytes": encoded}


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
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _renamed(error: Wrong, name: str) -> Wrong:
    """Return the error in the words by which clients know that a model is not there."""
    if error.status != 404:
        return error
    return Wrong(404, f"model {name!r} not found: {error.message}", param="model")
