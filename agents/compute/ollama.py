"""Ollama, through its own client library and its native API."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx
import ollama
import pydantic

from .calls import call_in, call_schema, described, forced, linked
from .gate import LOAD_GUESS_BYTES_PER_MS, Gate, Limits, guess_tokens
from .ports import (
    Capability,
    Chunk,
    Compute,
    ComputeBusy,
    DoneReason,
    Embeddings,
    Estimate,
    Logprob,
    Message,
    ModelInfo,
    Prompt,
    PromptRefused,
    ToolCall,
    Unsupported,
    Usage,
    check_texts,
    failed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from coase.protocol.errors import ComputeFailed

HOST_DEFAULT: Final = "http://127.0.0.1:11434"
CONNECT_MAX_S: Final = 5
ASK_MAX_S: Final = 10
MODELS_SHOWN_MAX: Final = 32  # Each costs a request for its context size.
ERROR_SHOWN_MAX_CHARS: Final = 300
_NS_PER_MS: Final = 1_000_000
_CAPABILITIES: Final[tuple[Capability, ...]] = (
    "completion",
    "tools",
    "vision",
    "thinking",
    "embedding",
)
_UNITS: Final = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def host_from_environment() -> str:
    """Return where Ollama listens by OLLAMA_HOST, as a client has to call it."""
    host = os.environ.get("OLLAMA_HOST", "").strip() or HOST_DEFAULT
    # The same variable tells the server to listen everywhere; that is no address to call.
    return host.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - this is what we avoid


class OllamaCompute(Compute):
    """One Ollama server; ``model`` None takes one that is loaded, else the smallest.

    Models that Ollama would run in its cloud are left out. Tokens are Ollama's own count, one a
    line of its stream until the last line says how many they were. ``context_tokens`` asks it for
    a context of that size, which reloads the model if it has another one; 0 leaves that to Ollama,
    which cuts off the head of a longer prompt.
    """

    def __init__(
        self,
        host: str | None = None,
        *,
        model: str | None = None,
        context_tokens: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self._host = host or host_from_environment()
        self._model = model
        self._context_tokens = context_tokens
        self._gate = Gate(self.name, limits or Limits())
        # Silence is timed by the gate, which knows the first token from the next.
        timeout = httpx.Timeout(None, connect=CONNECT_MAX_S)
        self._client = ollama.AsyncClient(host=self._host, timeout=timeout)
        self._load_ms: dict[str, int] = {}

    @property
    def name(self) -> str:
        """What it is and where."""
        return f"Ollama at {self._host}"

    async def models(self) -> list[ModelInfo]:
        """Return what ``/api/tags`` lists and ``/api/ps`` has loaded, the default first."""
        with _Blamed(self.name):
            with anyio.fail_after(ASK_MAX_S):
                listed = (await self._client.list()).models
                loaded = {entry.model for entry in (await self._client.ps()).models}
                infos: list[ModelInfo] = []
                for entry in sorted(listed, key=lambda e: (e.model not in loaded, e.size or 0)):
                    if entry.model and len(infos) < MODELS_SHOWN_MAX:
                        shown = await self._shown(entry.model)
                        if shown is not None:
                            infos.append(_info(entry, shown, entry.model in loaded))
        return sorted(
            infos, key=lambda i: (i.name != self._model, "completion" not in i.capabilities)
        )

    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return a guess of the tokens, the pace so far, and loading if it is not loaded."""
        prompt.check()
        models = await self.models()
        name = prompt.model or self._model or _first(models, self.name)
        info = next((info for info in models if info.name == name), None)
        if info is None:
            raise PromptRefused(f"{self.name} has no model {name!r}. Run `ollama pull {name}`")
        loading_ms = 0
        if not info.loaded:
            loading_ms = self._load_ms.get(name, info.size_bytes // LOAD_GUESS_BYTES_PER_MS)
        return self._gate.estimated(
            prompt, input_tokens=guess_tokens(prompt), exact=False, loading_ms=loading_ms
        )

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as Ollama sends it."""
        return self._gate.run(prompt, lambda: self._stream(prompt))

    async def embed(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Return what ``/api/embed`` makes of the texts."""
        check_texts(texts)
        return await self._gate.once(lambda: self._embed(list(texts), model))

    async def _embed(self, texts: list[str], model: str | None) -> Embeddings:
        name = model
        if name is None:
            able = [info for info in await self.models() if "embedding" in info.capabilities]
            if not able:
                todo = "Run `ollama pull` with the name of one"
                raise Unsupported(f"{self.name} has no model that makes embeddings. {todo}")
            name = able[0].name
        begun = monotonic_ns()
        with _Blamed(self.name):
            made = await self._client.embed(model=name, input=texts, truncate=False)
            vectors = tuple(tuple(float(number) for number in row) for row in made.embeddings)
        if len(vectors) != len(texts) or len({len(vector) for vector in vectors}) != 1:
            raise failed(
                f"{self.name} failed", why="not one vector for each text", todo="Ask again"
            )
        elapsed_ms = (monotonic_ns() - begun) // _NS_PER_MS
        tokens = int(made.prompt_eval_count or 0)
        usage = Usage(input_tokens=tokens, output_tokens=0, duration_ms=elapsed_ms)
        return Embeddings(vectors=vectors, model=name, usage=usage)

    async def close(self) -> None:
        """Close the connections, which ends what runs."""
        await self._client.close()  # type: ignore[no-untyped-call]

    async def _stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        begun = monotonic_ns()
        model = prompt.model or self._model
        if model is None:
            model = self._model = _first(await self.models(), self.name)
        counted, called = 0, False
        held: list[str] | None = [] if forced(prompt) else None
        with _Blamed(self.name):
            parts = await self._open(prompt, model)
            try:
                async for part in parts:
                    chunk = _chunk(part)
                    counted += chunk.tokens
                    if held is not None:
                        held.append(chunk.text)
                        chunk = replace(chunk, text="")
                    called = called or bool(chunk.tool_calls)
                    if part.done:
                        self._learn_load(model, part)
                        elapsed_ms = (monotonic_ns() - begun) // _NS_PER_MS
                        last = _last(part, chunk, counted, guess_tokens(prompt), elapsed_ms)
                        yield _with_calls(last, "".join(held or ()), called=called)
                        return
                    if chunk.text or chunk.tokens:
                        yield chunk
            finally:
                await parts.aclose()

    async def _open(self, prompt: Prompt, model: str) -> Any:
        options: dict[str, Any] = {
            "num_predict": prompt.max_tokens,
            "temperature": prompt.temperature,
            **prompt.sampling(),
        }
        if prompt.seed is not None:
            options["seed"] = prompt.seed
        if prompt.stop:
            options["stop"] = list(prompt.stop)
        if self._context_tokens:
            options["num_ctx"] = self._context_tokens
        schema = prompt.response_schema
        if forced(prompt):
            schema = call_schema(prompt.tools)  # It has no word for a call that must be made.
        asked: dict[str, Any] = {
            "model": model,
            "stream": True,
            "options": options,
            "format": None if schema is None else dict(schema),
            "logprobs": prompt.logprobs or None,
            "top_logprobs": prompt.top_logprobs or None,
        }
        if prompt.text:
            return await self._client.generate(prompt=prompt.text, raw=True, **asked)
        tools = [described(tool) for tool in prompt.tools if prompt.tool_choice != "none"]
        messages = [_wired(message) for message in linked(prompt.messages)]
        return await self._client.chat(
            messages=messages, tools=tools, think=prompt.thinking, **asked
        )

    async def _shown(self, model: str) -> _Shown | None:
        """Return what the server tells of a model, or None if it is not for us."""
        try:
            shown = await self._client.show(model)
        except ollama.ResponseError:
            return None  # Removed since it was listed, or broken: the others are still good.
        except pydantic.ValidationError:
            # The client insists on fields that the server may omit.
            return _Shown(context_tokens=self._context_tokens)
        if getattr(shown, "remote_host", None) or model.endswith(("-cloud", ":cloud")):
            return None
        told = shown.capabilities or ["completion"]  # Servers of old do not say.
        known = tuple(name for name in _CAPABILITIES if name in told)
        return _Shown(
            context_tokens=self._context_tokens or _number(shown, ".context_length"),
            capabilities=known,
            parameter_count=_number(shown, "general.parameter_count"),
            embedding_length=_number(shown, ".embedding_length"),
        )

    def _learn_load(self, model: str, part: Any) -> None:
        load_ms = (part.load_duration or 0) // _NS_PER_MS
        # A loaded model reports some milliseconds; they say nothing about loading it.
        if load_ms > self._load_ms.get(model, 0) // 2:
            self._load_ms[model] = load_ms


class _Blamed:
    """Turns what the client library raises into what went wrong, why, and what to do."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ollama.ResponseError):
            raise self._refusal(error) from error
        if isinstance(error, ConnectionError | httpx.ConnectError | httpx.ConnectTimeout):
            why, todo = "nothing answers there", "Run `ollama serve`, or set OLLAMA_HOST"
            raise failed(f"{self._name} cannot be reached", why=why, todo=todo) from error
        if isinstance(error, TimeoutError):
            raise failed(
                f"{self._name} is silent", why=f"no answer within {ASK_MAX_S} s", todo="See its log"
            ) from error
        if isinstance(error, httpx.HTTPError):
            why = str(error) or type(error).__name__
            raise failed(
                f"{self._name} broke off", why=why, todo="See that it runs and ask again"
            ) from error
        if isinstance(error, pydantic.ValidationError | ValueError | TypeError | AttributeError):
            why = " ".join(str(error).split())[:ERROR_SHOWN_MAX_CHARS]
            raise failed(
                f"{self._name} does not speak Ollama's API", why=why, todo="See the address"
            ) from error

    def _refusal(self, error: ollama.ResponseError) -> ComputeFailed:
        why = f"{error.error[:ERROR_SHOWN_MAX_CHARS]} (status {error.status_code})"
        if error.status_code == 400 and "does not support" in error.error:
            return Unsupported(f"{self._name} cannot do that: {why}. Ask another model or engine")
        if error.status_code in (400, 404, 413, 422):
            return PromptRefused(f"{self._name} refused the prompt: {why}. Change it or the model")
        if error.status_code in (429, 503):
            return ComputeBusy(f"{self._name} is busy: {why}. Ask later or elsewhere")
        return failed(f"{self._name} failed", why=why, todo="See its log, and ask again")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What ``/api/show`` tells beyond the list."""

    context_tokens: int = 0
    capabilities: tuple[Capability, ...] = ("completion",)
    parameter_count: int = 0
    embedding_length: int = 0


def _number(shown: Any, end: str) -> int:
    entries = (shown.modelinfo or {}).items()
    return next((int(value) for key, value in entries if key.endswith(end)), 0)


def _first(models: list[ModelInfo], name: str) -> str:
    able = [info for info in models if "completion" in info.capabilities]
    if not able:
        why, todo = "it has no model of its own", "Run `ollama pull` with the name of one"
        raise failed(f"{name} cannot answer", why=why, todo=todo)
    return able[0].name


def _info(entry: Any, shown: _Shown, loaded: bool) -> ModelInfo:
    details = entry.details
    modified = entry.modified_at
    return ModelInfo(
        name=entry.model,
        digest=entry.digest or "",
        quantisation=(details.quantization_level or "") if details else "",
        context_tokens=shown.context_tokens,
        loaded=loaded,
        size_bytes=int(entry.size or 0),
        capabilities=shown.capabilities,
        family=(details.family or "") if details else "",
        parameter_count=shown.parameter_count
        or _count((details.parameter_size or "") if details else ""),
        embedding_length=shown.embedding_length,
        modified_s=max(int(modified.timestamp()), 0) if modified is not None else 0,
    )


def _count(size: str) -> int:
    """Return how many parameters ``7.6B`` is."""
    number, unit = size[:-1], size[-1:].upper()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        return 0


def _wired(message: Message) -> dict[str, Any]:
    wired: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        wired["images"] = [ollama.Image(value=image.data) for image in message.images]
    if message.thinking:
        wired["thinking"] = message.thinking
    if message.tool_calls:
        wired["tool_calls"] = [
            {"function": {"name": call.name, "arguments": call.read() or {}}}
            for call in message.tool_calls
        ]
    if message.tool_name:
        wired["tool_name"] = message.tool_name
    return wired


def _chunk(part: Any) -> Chunk:
    said = part.message if hasattr(part, "message") else part
    text = (said.content if hasattr(part, "message") else said.response) or ""
    thinking = said.thinking or ""
    calls = tuple(_called(call) for call in getattr(said, "tool_calls", None) or ())
    logprobs = tuple(_logprob(entry) for entry in part.logprobs or ())
    tokens = len(logprobs) or (1 if text or thinking or calls else 0)
    return Chunk(text=text, thinking=thinking, tool_calls=calls, tokens=tokens, logprobs=logprobs)


def _called(call: Any) -> ToolCall:
    arguments = json.dumps(dict(call.function.arguments or {}), ensure_ascii=False)
    return ToolCall(name=call.function.name, arguments=arguments)


def _logprob(entry: Any) -> Logprob:
    top = tuple(Logprob(o.token, o.logprob) for o in getattr(entry, "top_logprobs", None) or ())
    return Logprob(entry.token, entry.logprob, top)


def _with_calls(last: Chunk, held: str, *, called: bool) -> Chunk:
    """Return the last chunk with the call that a schema bound, if that is how it was forced."""
    call = call_in(held) if held and not called else None
    if call is not None:
        last = replace(last, tool_calls=(*last.tool_calls, call))
    elif held and not called:
        last = replace(last, text=held)
    return replace(last, done_reason="tool_calls") if called or call is not None else last


def _last(part: Any, chunk: Chunk, counted: int, input_guess: int, elapsed_ms: int) -> Chunk:
    reason: DoneReason = "length" if part.done_reason == "length" else "stop"
    output_tokens = max(part.eval_count or 0, counted)
    worked_ms = ((part.total_duration or 0) - (part.load_duration or 0)) // _NS_PER_MS
    usage = Usage(
        # Ollama leaves the count out when the whole prompt was cached.
        input_tokens=part.prompt_eval_count or input_guess,
        output_tokens=output_tokens,
        duration_ms=worked_ms if part.total_duration else elapsed_ms,
    )
    return Chunk(
        text=chunk.text,
        thinking=chunk.thinking,
        tool_calls=chunk.tool_calls,
        tokens=chunk.tokens + output_tokens - counted,
        done=True,
        done_reason=reason,
        usage=usage,
        logprobs=chunk.logprobs,
    )
