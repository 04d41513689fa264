"""Any server that speaks the OpenAI chat API: vLLM, llama.cpp, LM Studio, a hosted one."""

from __future__ import annotations

import asyncio
import base64
from contextlib import aclosing, suppress
from http import HTTPStatus
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from .calls import call_in, call_schema, described, forced, linked
from .connection import Connection, parts_of, read_some
from .gate import Gate, Limits, guess_tokens
from .ports import (
    Capability,
    Chunk,
    Compute,
    ComputeBusy,
    DoneReason,
    Embeddings,
    Estimate,
    Image,
    Logprob,
    Message,
    ModelInfo,
    Prompt,
    PromptRefused,
    PromptTooLong,
    ToolCall,
    Unsupported,
    Usage,
    check_texts,
    failed,
    read_json,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

    from coase.protocol.errors import ComputeFailed

END_MAX_S: Final = 0.1  # After the last word there is nothing but the end of the stream.
ASK_MAX_S: Final = 10  # For questions that run no model.
# One token with its top log-probabilities is a few KiB. A server that sends more in one line
# is broken or hostile.
LINE_MAX_BYTES: Final = 1024 * 1024
ERROR_SHOWN_MAX_CHARS: Final = 300
ERROR_READ_MAX_BYTES: Final = 64 * 1024
# Of 2,048 texts, each with 4,096 numbers of 12 characters.
EMBEDDINGS_MAX_BYTES: Final = 128 * 1024 * 1024
ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024  # Ten thousand models, each described at length.


class OpenAICompute(Compute):
    """One server, at ``base_url`` (with its ``/v1``); ``model`` None takes its first one.

    ``extra`` goes into the body of every request. With ``calls_by_schema`` a call that has to be
    made is bound by a schema instead of asked for, for servers that do not insist. ``gate`` is for
    sharing a queue.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        model: str | None = None,
        limits: Limits | None = None,
        extra: Mapping[str, Any] | None = None,
        calls_by_schema: bool = False,
        name: str = "",
        gate: Gate | None = None,
    ) -> None:
        self._connection = Connection(base_url, api_key=api_key)
        self._name = name or f"the OpenAI-compatible server at {self._connection.base_url}"
        self._model = model
        self._extra = dict(extra or {})
        self._calls_by_schema = calls_by_schema
        # Silence is timed by the gate, which knows the first token from the next.
        self._gate = gate or Gate(self._name, limits or Limits())

    @property
    def name(self) -> str:
        """What it is and where."""
        return self._name

    async def models(self) -> list[ModelInfo]:
        """Return what ``/models`` lists; the API tells little more than names."""
        listed = await self.ask("GET", "/models")
        try:
            entries = [entry for entry in listed["data"] if isinstance(entry["id"], str)]
        except (KeyError, TypeError) as error:
            raise self._nonsense(repr(listed)) from error
        infos = [_info(entry) for entry in entries]
        return sorted(infos, key=lambda info: info.name != self._model)

    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return a guess from the prompt's size and the pace so far; asks nobody."""
        prompt.check()
        tokens = guess_tokens(prompt)
        return self._gate.estimated(prompt, input_tokens=tokens, exact=False, loading_ms=0)

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as the server sends it."""
        return self._gate.run(prompt, lambda: self.ungated(prompt))

    async def embed(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Return what ``/embeddings`` makes of the texts."""
        check_texts(texts)
        return await self._gate.once(lambda: self.embed_ungated(texts, model))

    async def embed_ungated(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Return the vectors without a queue or time-outs, for owners of a gate of their own."""
        begun = monotonic_ns()
        name = model or self._model or await self._first_model("embedding")
        body = {"model": name, "input": list(texts), "encoding_format": "float"}
        try:
            async with await self._connection.open("POST", "/embeddings", body) as response:
                await self._welcome(response)
                content = await read_some(response, EMBEDDINGS_MAX_BYTES)
        except aiohttp.ClientError as error:
            raise self._away(error) from error
        try:
            found = read_json(content)
            vectors = _vectors(found["data"], len(texts))
            tokens = int((found.get("usage") or {}).get("prompt_tokens") or 0)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._nonsense(content[:ERROR_SHOWN_MAX_CHARS].decode("utf-8", "replace")) from (
                error
            )
        duration_ms = (monotonic_ns() - begun) // 1_000_000
        usage = Usage(input_tokens=tokens, output_tokens=0, duration_ms=duration_ms)
        return Embeddings(vectors=vectors, model=name, usage=usage)

    async def close(self) -> None:
        """Close the connections, which ends what runs."""
        await self._connection.close()

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON answer to a question that runs no model; ``path`` may be a whole URL.

        :raises ComputeFailed: if the server is away, refuses, or answers nonsense
        """
        opened = self._connection.open(method, path, body, within_s=ASK_MAX_S)
        try:
            async with await opened as response:
                await self._welcome(response)
                content = await read_some(response, ANSWER_MAX_BYTES)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._away(error) from error
        try:
            return read_json(content)
        except ValueError as error:
            raise self._nonsense(content.decode("utf-8", "replace")) from error

    async def ungated(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the answer without a queue or time-outs, for owners of a gate of their own."""
        begun = monotonic_ns()
        model = prompt.model or self._model or await self._first_model()
        path = "/completions" if prompt.text else "/chat/completions"
        by_schema = self._calls_by_schema and forced(prompt)
        body = {**_body(prompt, model), **self._extra}
        if by_schema:
            schema = {"name": "call", "schema": call_schema(prompt.tools), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
            body["tool_choice"] = "none"
        tally = _Tally(guess_tokens(prompt), by_schema=by_schema)
        try:
            async with await self._connection.open("POST", path, body) as response:
                await self._welcome(response)
                async with aclosing(self._events(response)) as events:
                    async for event in events:
                        chunk = self._understood(tally, event)
                        if chunk is not None:
                            yield chunk
        except aiohttp.ClientError as error:
            raise self._away(error) from error
        if tally.reason:
            yield tally.last(duration_ms=(monotonic_ns() - begun) // 1_000_000)

    async def _welcome(self, response: aiohttp.ClientResponse) -> None:
        """Return if the server is ready to answer."""
        if response.status != HTTPStatus.OK:
            raise self._refusal(response.status, await read_some(response, ERROR_READ_MAX_BYTES))

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncGenerator[Any, None]:
        lines = _lines(parts_of(response))
        async for line in lines:
            if line is None:
                raise self._nonsense(f"a line of over {LINE_MAX_BYTES} bytes")
            field, _, data = line.partition(b":")
            if field not in (b"data", b"error"):
                if field in (b"", b"event", b"id", b"retry"):
                    continue  # Blank lines, comments (keep-alives) and other fields of SSE.
                raise self._nonsense(line.decode("utf-8", "replace"))
            if data.strip() == b"[DONE]":
                # Only a connection that was read to its end serves the next request too.
                with suppress(TimeoutError):
                    async with asyncio.timeout(END_MAX_S):
                        async for _ in lines:
                            pass
                return
            try:
                yield read_json(data)
            except ValueError as error:
                raise self._nonsense(data.decode("utf-8", "replace")) from error

    def _understood(self, tally: _Tally, event: Any) -> Chunk | None:
        if isinstance(event, dict) and event.get("error"):
            raise failed(
                f"{self._name} broke off", why=_error_text(event), todo="Ask again or elsewhere"
            )
        try:
            return tally.take(event)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise self._nonsense(repr(event)) from error

    async def _first_model(self, capability: Capability = "completion") -> str:
        models = await self.models()
        able = [info for info in models if capability in info.capabilities]
        if not models:
            raise failed(
                f"{self._name} cannot answer", why="it has no model", todo="Load one into it"
            )
        if capability != "completion":
            return (able or models)[0].name
        self._model = (able or models)[0].name
        return self._model

    def _refusal(self, status: int, content: bytes) -> ComputeFailed:
        too_long = b"too large to process" in content or b"exceed_context_size" in content
        too_long = too_long or b"context_length_exceeded" in content
        try:
            why = _error_text(read_json(content))
        except ValueError:
            why = content.decode("utf-8", "replace")
        why = f"{why[:ERROR_SHOWN_MAX_CHARS] or 'no reason given'} (status {status})"
        if status == 501 or (status in (400, 500) and _says_unable(why)):
            return Unsupported(f"{self._name} cannot do that: {why}. Ask another model or engine")
        if too_long:
            return PromptTooLong(f"{self._name} refused the prompt: {why}. Shorten it")
        if status in (400, 404, 413, 422):
            return PromptRefused(f"{self._name} refused the prompt: {why}. Change it or the model")
        if status in (429, 503):
            return ComputeBusy(f"{self._name} is busy: {why}. Ask later or elsewhere")
        todo = "See its log"
        if status in (401, 403):
            todo = "See that the API key is right"
        return failed(f"{self._name} failed", why=why, todo=todo)

    def _away(self, error: aiohttp.ClientError | TimeoutError) -> ComputeFailed:
        why = str(error) or type(error).__name__
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            todo = "See that it runs and that the address is right"
            return failed(f"{self._name} cannot be reached", why=why, todo=todo)
        return failed(
            f"{self._name} broke off",
            why=why,
            todo="It may have crashed or been stopped: see that it runs and ask again",
        )

    def _nonsense(self, what: str) -> ComputeFailed:
        return failed(
            f"{self._name} does not speak the OpenAI API",
            why=f"it sent {what[:ERROR_SHOWN_MAX_CHARS]!r}",
            todo="See that the address is that of the API (it mostly ends in /v1)",
        )


class _Tally:
    """Turns the events of one answer into chunks and keeps count of the tokens."""

    def __init__(self, input_guess: int, *, by_schema: bool = False) -> None:
        self.reason: DoneReason = ""
        self._input_tokens = input_guess
        self._cached_tokens = 0
        self._counted = 0
        self._reported = 0
        self._calls: dict[int, dict[str, str]] = {}
        # The text of a call that a schema binds is held until the whole call is there.
        self._held: list[str] | None = [] if by_schema else None

    def take(self, event: dict[str, Any]) -> Chunk | None:
        """Return the chunk that an event holds, if it holds any text."""
        usage = event.get("usage")
        if usage:
            self._input_tokens = int(usage["prompt_tokens"])
            self._reported = int(usage["completion_tokens"])
            details = usage.get("prompt_tokens_details") or {}
            self._cached_tokens = int(details.get("cached_tokens") or 0)
        choices = event.get("choices")
        if not choices:
            return None
        choice = choices[0]
        if choice.get("finish_reason"):
            self.reason = "length" if choice["finish_reason"] == "length" else "stop"
        delta = choice.get("delta") or {}
        text = str(choice.get("text") or delta.get("content") or "")
        # llama.cpp, vLLM and DeepSeek use the one name, OpenRouter and newer vLLM the other.
        thinking = str(delta.get("reasoning_content") or delta.get("reasoning") or "")
        calling = delta.get("tool_calls") or ()
        for part in calling:
            self._add_call(part)
        logprobs = _logprobs(choice.get("logprobs"))
        # llama.cpp says how many it has written; others send one token an event.
        written = int((event.get("timings") or {}).get("predicted_n") or 0)
        tokens = len(logprobs) or (1 if text or thinking or calling else 0)
        if written:
            tokens = max(0, written - self._counted)
        if not text and not thinking and not tokens:
            return None
        self._counted += tokens
        if self._held is not None:
            self._held.append(text)
            text = ""
        return Chunk(text=text, thinking=thinking, tokens=tokens, logprobs=logprobs)

    def _add_call(self, part: dict[str, Any]) -> None:
        call = self._calls.setdefault(int(part.get("index") or 0), {"arguments": ""})
        function = part.get("function") or {}
        call["id"] = str(part.get("id") or call.get("id", ""))
        call["name"] = str(function.get("name") or call.get("name", ""))
        call["arguments"] += str(function.get("arguments") or "")

    def last(self, *, duration_ms: int) -> Chunk:
        """Return the last chunk, which makes the tokens add up to what the server reports."""
        output_tokens = max(self._reported, self._counted)
        usage = Usage(
            input_tokens=self._input_tokens,
            output_tokens=output_tokens,
            cached_input_tokens=self._cached_tokens,
            duration_ms=duration_ms,
        )
        tokens = output_tokens - self._counted
        text, calls = "", [ToolCall(**call) for call in self._calls.values() if call["name"]]
        if self._held is not None:
            text = "".join(self._held)
            call = call_in(text)
            if call is not None:
                text, calls = "", [call]
        if calls:
            self.reason = "tool_calls"
        return Chunk(
            text=text,
            tool_calls=tuple(calls),
            tokens=tokens,
            done=True,
            done_reason=self.reason,
            usage=usage,
        )


def _body(prompt: Prompt, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": prompt.max_tokens,
        "temperature": prompt.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **prompt.sampling(),
    }
    if prompt.text:
        body["prompt"] = prompt.text
    else:
        body["messages"] = wire_messages(prompt)
    if prompt.seed is not None:
        body["seed"] = prompt.seed
    if prompt.stop:
        body["stop"] = list(prompt.stop)
    if prompt.logprobs:
        # The older API takes a number.
        body["logprobs"] = max(prompt.top_logprobs, 1) if prompt.text else True
        if prompt.top_logprobs and not prompt.text:
            body["top_logprobs"] = prompt.top_logprobs
    if prompt.response_schema is not None:
        schema = {"name": "answer", "schema": dict(prompt.response_schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if prompt.tools:
        body["tools"] = [described(tool) for tool in prompt.tools]
        body["tool_choice"] = prompt.tool_choice
    if prompt.thinking is not None:
        # The one is how templates are told (llama.cpp, vLLM), the other how hosted models are.
        body["chat_template_kwargs"] = {"enable_thinking": bool(prompt.thinking)}
        if isinstance(prompt.thinking, str):
            body["reasoning_effort"] = prompt.thinking
    return body


def wire_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the conversation as this API's servers take it."""
    return [_wired(message) for message in linked(prompt.messages)]


def _wired(message: Message) -> dict[str, Any]:
    wired: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        texts = [{"type": "text", "text": message.content}] if message.content else []
        wired["content"] = [*texts, *(_pictured(image) for image in message.images)]
    if message.tool_calls:
        wired["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                # Servers read them, and one that a model wrote badly would break all that follows.
                "function": {
                    "name": call.name,
                    "arguments": call.arguments if call.read() is not None else "{}",
                },
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        wired["tool_call_id"] = message.tool_call_id
    return wired


def _pictured(image: Image) -> dict[str, Any]:
    data = base64.b64encode(image.data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{image.media_type};base64,{data}"}}


def _vectors(data: list[dict[str, Any]], count: int) -> tuple[tuple[float, ...], ...]:
    entries = sorted(data, key=lambda entry: int(entry["index"]))
    vectors = tuple(tuple(float(number) for number in entry["embedding"]) for entry in entries)
    if len(vectors) != count or not vectors[0] or len({len(vector) for vector in vectors}) != 1:
        raise ValueError("not one vector for each text")
    return vectors


def _info(entry: dict[str, Any]) -> ModelInfo:
    meta = entry.get("meta")
    meta = meta if isinstance(meta, dict) else {}

    def number(name: str) -> int:
        value = meta.get(name)
        return value if isinstance(value, int) else 0

    name = entry["id"]
    # Nobody says what a model can do; that it cannot is heard from the server when it is asked.
    capabilities: tuple[Capability, ...] = ("completion", "tools")
    if "embed" in name.lower():
        capabilities = ("embedding",)
    told = entry.get("architecture")
    if isinstance(told, dict) and "image" in (told.get("input_modalities") or ()):
        capabilities = (*capabilities, "vision")
    created = entry.get("created")
    return ModelInfo(
        name=name,
        context_tokens=_context_tokens(entry),
        quantisation=str(meta.get("ftype") or ""),
        size_bytes=number("size"),
        parameter_count=number("n_params"),
        embedding_length=number("n_embd"),
        capabilities=capabilities,
        modified_s=created if isinstance(created, int) else 0,
    )


def _says_unable(why: str) -> bool:
    why = why.lower()
    return "not supported" in why or "does not support" in why


def _logprobs(found: Any) -> tuple[Logprob, ...]:
    if not found:
        return ()
    if found.get("content"):
        return tuple(_logprob(entry) for entry in found["content"])
    pairs = zip(found.get("tokens") or (), found.get("token_logprobs") or (), strict=True)
    return tuple(Logprob(str(token), float(logprob)) for token, logprob in pairs)


def _logprob(entry: dict[str, Any]) -> Logprob:
    top = tuple(_logprob(other) for other in entry.get("top_logprobs") or ())
    return Logprob(str(entry["token"]), float(entry["logprob"]), top)


def _context_tokens(entry: dict[str, Any]) -> int:
    meta = entry.get("meta")
    found = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else 0)
    return found if isinstance(found, int) else 0


def _error_text(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:ERROR_SHOWN_MAX_CHARS]


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes | None]:
    """Yield the lines of a byte stream that hold anything; None for one that is too long."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line:
                yield line.rstrip(b"\r")
        if len(rest) > LINE_MAX_BYTES:
            yield None
            return
    if rest:
        yield rest
