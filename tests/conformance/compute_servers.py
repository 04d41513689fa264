"""Servers for tests of the compute backends: small HTTP servers, and the real engine as one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from coase.agents.compute import engine
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.gguf import facts_of
from coase.agents.compute.model import find_model
from coase.agents.compute.template import template_for

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL_NAME = "smollm2:135m"
EMBEDDER = "all-minilm:22m"
API_KEY = "a key for this test alone"


@dataclass
class Request:
    """What a client asked, and how it ended."""

    method: str
    path: str
    body: Any
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client went away before the answer was complete."""


class Die(Exception):
    """A handler raises it to cut the connection in the middle of the answer."""


class Status(Exception):
    """A handler raises it before its first line to answer with another status."""

    def __init__(self, code: int, body: Any) -> None:
        super().__init__(code)
        self.code, self.body = code, body


Handler = Callable[[Request], AsyncGenerator[bytes, None]]


@dataclass
class Server:
    """Where a test's server listens, and what it was asked."""

    url: str
    requests: list[Request]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Server]:
    """Serve HTTP on loopback: each piece that ``handler`` yields is sent at once."""
    requests: list[Request] = []
    connections: set[asyncio.Task[None]] = set()
    answers: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        connections.add(connection)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await _read(reader)
            requests.append(request)
            answering = asyncio.create_task(_answer(handler, request, writer))
            answers.add(answering)
            watching = asyncio.create_task(reader.read(1))  # Nothing more comes but the end.
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                request.gone.set()
            for task in (answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield Server(f"http://{host}:{port}", requests)
    finally:
        server.close()
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*connections)
        await server.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    method, path, _ = head.split(" ", 2)
    lines = (line.partition(":") for line in head.split("\r\n")[1:])
    headers = {name.lower(): value.strip() for name, _, value in lines}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, json.loads(content) if content else None)


async def _answer(handler: Handler, request: Request, writer: asyncio.StreamWriter) -> None:
    def head(code: int) -> bytes:
        return (
            f"HTTP/1.1 {code} Whatever\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        ).encode()

    begun = False
    try:
        async with aclosing(handler(request)) as pieces:
            async for piece in pieces:
                if not begun:
                    writer.write(head(200))
                    begun = True
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
        writer.write((b"" if begun else head(200)) + b"0\r\n\r\n")
    except Status as status:
        content = json.dumps(status.body).encode()
        writer.write(head(status.code) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))
    except Die:
        writer.transport.abort()
        return
    await writer.drain()


def small_model() -> Path:
    """Return the path of the small model, which the set-up of the repository installs."""
    path = find_model()
    assert path is not None, "the small model is missing: run the set-up, or `coase model get`"
    return path


@contextmanager
def real_engine() -> Iterator[str]:
    """Run the real engine as the OpenAI-compatible server that it is; give its address."""
    settings = {
        "model": str(small_model()),
        "name": MODEL_NAME,
        "slots": 4,
        "context_tokens": 1024,
        "threads": 2,
        "api_key": API_KEY,
        "chat_template": template_for(facts_of(small_model())),
    }
    command = [sys.executable, "-P", str(Path(engine.__file__))]
    with subprocess.Popen(
        command,
        env={"OMP_WAIT_POLICY": "passive"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        yield json.loads(process.stdout.readline())["address"]
        process.stdin.close()


class OllamaFront:
    """Ollama's documented wire format in front of the real engine.

    No Ollama server can be installed from a package here, so the format is ours, written by its
    documentation; the client library that reads it is Ollama's own, and the answers come from
    the real model.
    """

    def __init__(self, engine_url: str) -> None:
        self._engine_url = engine_url

    async def __call__(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Answer one request."""
        if request.path in ("/api/chat", "/api/generate"):
            if request.body["model"] != MODEL_NAME:
                raise Status(404, {"error": f"model '{request.body['model']}' not found"})
            async with aclosing(self._generate(request)) as lines:
                async for line in lines:
                    yield json.dumps(line).encode() + b"\n"
            return
        if request.path == "/api/embed":
            yield json.dumps(await self._embedded(request.body)).encode()
            return
        yield json.dumps(self.told(request)).encode()

    async def _embedded(self, body: Any) -> Any:
        if body["model"] != EMBEDDER:
            raise Status(400, {"error": f"{body['model']} does not support embeddings"})
        made = await EchoCompute().embed(body["input"])
        count = made.usage.input_tokens
        return {"model": EMBEDDER, "embeddings": made.vectors, "prompt_eval_count": count}

    def told(self, request: Request) -> Any:
        """Answer a question that runs no model."""
        details = {
            "format": "gguf",
            "family": "llama",
            "parameter_size": "134.52M",
            "quantization_level": "Q4_1",
        }
        entry = {"name": MODEL_NAME, "model": MODEL_NAME, "size": 98_362_432, "digest": "ab" * 32}
        match request.path:
            case "/api/version":
                return {"version": "0.33.0"}
            case "/api/tags":
                modified = {"modified_at": "2026-01-01T00:00:00Z", "details": details}
                embedder = {"name": EMBEDDER, "model": EMBEDDER, "size": 45_960_996}
                return {"models": [{**entry, **modified}, {**embedder, **modified}]}
            case "/api/ps":
                return {"models": [{**entry, "details": details, "size_vram": 0}]}
            case "/api/show":
                info = {
                    "general.architecture": "llama",
                    "general.parameter_count": 134_515_008,
                    "llama.context_length": 8192,
                    "llama.embedding_length": 576,
                }
                able = ["completion", "tools"]
                if request.body["model"] == EMBEDDER:
                    able = ["embedding"]
                return {"details": details, "model_info": info, "capabilities": able}
        raise Status(404, {"error": "not found"})

    async def _generate(self, request: Request) -> AsyncGenerator[dict[str, Any], None]:
        asked, options = request.body, request.body["options"]
        is_chat = request.path == "/api/chat"
        body: dict[str, Any] = {
            "max_tokens": options["num_predict"],
            "stream": True,
            "stream_options": {"include_usage": True},
            **{key: options[key] for key in ("temperature", "seed", "stop") if key in options},
        }
        if asked.get("think"):
            raise Status(400, {"error": f"{MODEL_NAME!r} does not support thinking"})
        if is_chat:
            if any(message.get("images") for message in asked["messages"]):
                raise Status(400, {"error": f"{MODEL_NAME!r} does not support images"})
            body["messages"] = [self._message(message) for message in asked["messages"]]
            body["tools"] = asked.get("tools")
        else:
            body["prompt"] = asked["prompt"]
        if asked.get("logprobs"):
            body["logprobs"] = True if is_chat else 1
        if asked.get("format"):
            body["json_schema"] = asked["format"]
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        headers = {"Authorization": f"Bearer {API_KEY}"}
        reason = ""
        usage: dict[str, int] = {}
        async with (
            httpx.AsyncClient(timeout=120) as client,
            client.stream("POST", self._engine_url + path, json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                message = json.loads(await answer.aread())["error"]["message"]
                raise Status(answer.status_code, {"error": message})
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    reason = choice["finish_reason"] or reason
                    text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    found = (choice.get("logprobs") or {}).get("content") or ()
                    if text or found:
                        yield {**self._piece(is_chat, text), "logprobs": list(found)}
        yield {
            **self._piece(is_chat, ""),
            "done": True,
            "done_reason": reason,
            "total_duration": 2_000_000_000,
            "load_duration": 1_000_000_000,
            "prompt_eval_count": usage["prompt_tokens"],
            "eval_count": usage["completion_tokens"],
        }

    @staticmethod
    def _message(message: Any) -> Any:
        found = {"role": message["role"], "content": message.get("content", "")}
        for entry in message.get("tool_calls") or ():
            given = entry["function"]
            function = {"name": given["name"], "arguments": json.dumps(given["arguments"])}
            found["tool_calls"] = [{"id": "1", "type": "function", "function": function}]
        if message["role"] == "tool":
            found["tool_call_id"] = "1"
        return found

    @staticmethod
    def _piece(is_chat: bool, text: str) -> dict[str, Any]:
        head = {"model": MODEL_NAME, "created_at": "2026-01-01T00:00:00Z", "done": False}
        if is_chat:
            return {**head, "message": {"role": "assistant", "content": text}}
        return {**head, "response": text}
