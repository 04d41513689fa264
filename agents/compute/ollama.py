"""Ollama, through its own client library and its native API."""

from __future__ import annotations

import os
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx
import ollama
import pydantic

from .gate import Gate, Limits, guess_tokens
from .ports import (
    Chunk,
    Compute,
    ComputeBusy,
    DoneReason,
    Estimate,
    Logprob,
    ModelInfo,
    Prompt,
    PromptRefused,
    Usage,
    failed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from coase.protocol.errors import ComputeFailed

HOST_DEFAULT: Final = "http://127.0.0.1:11434"
CONNECT_MAX_S: Final = 5
ASK_MAX_S: Final = 10
MODELS_SHOWN_MAX: Final = 32  # Each costs a request for its context size.
LOAD_GUESS_BYTES_PER_MS: Final = 500_000  # A laptop's SSD reads 0.5 GB a second.
ERROR_SHOWN_MAX_CHARS: Final = 300
_NS_PER_MS: Final = 1_000_000


def host_from_environment() -> str:
    """Return where Ollama listens by OLLAMA_HOST, as a client has to call it."""
    host = os.environ.get("OLLAMA_HOST", "").strip() or HOST_DEFAULT
    # The same variable tells the server to listen everywhere; that is no address to call.
    return host.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - this is what we avoid


class OllamaCompute(Compute):
    """One Ollama server; ``model`` None takes one that is loaded, else the smallest.

    Models that Ollama would run in its cloud, and those that only embed, are left out. Tokens
    are Ollama's own count, one a line of its stream until the last line says how many they
    were. ``context_tokens`` asks it for a context of that size, which reloads the model if it
    has another one; 0 leaves that to Ollama, which cuts off the head of a longer prompt.
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
                        context_tokens = await self._context_of(entry.model)
                        if context_tokens is not None:
                            infos.append(_info(entry, context_tokens, entry.model in loaded))
        return sorted(infos, key=lambda info: info.name != self._model)

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

    async def close(self) -> None:
        """Close the connections, which ends what runs."""
        await self._client.close()  # type: ignore[no-untyped-call]

    async def _stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        begun = monotonic_ns()
        model = prompt.model or self._model
        if model is None:
            model = self._model = _first(await self.models(), self.name)
        counted = 0
        with _Blamed(self.name):
            parts = await self._open(prompt, model)
            try:
                async for part in parts:
                    chunk = _chunk(part)
                    counted += chunk.tokens
                    if part.done:
                        self._learn_load(model, part)
                        elapsed_ms = (monotonic_ns() - begun) // _NS_PER_MS
                        yield _last(part, chunk, counted, guess_tokens(prompt), elapsed_ms)
                        return
                    if chunk.text or chunk.tokens:
                        yield chunk
            finally:
                await parts.aclose()

    async def _open(self, prompt: Prompt, model: str) -> Any:
        options: dict[str, Any] = {
            "num_predict": prompt.max_tokens,
            "temperature": prompt.temperature,
        }
        if prompt.seed is not None:
            options["seed"] = prompt.seed
        if prompt.stop:
            options["stop"] = list(prompt.stop)
        if self._context_tokens:
            options["num_ctx"] = self._context_tokens
        schema = prompt.response_schema
        asked: dict[str, Any] = {
            "model": model,
            "stream": True,
            "options": options,
            "format": None if schema is None else dict(schema),
            "logprobs": prompt.logprobs or None,
        }
        if prompt.text:
            return await self._client.generate(prompt=prompt.text, raw=True, **asked)
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        return await self._client.chat(messages=messages, **asked)

    async def _context_of(self, model: str) -> int | None:
        """Return what the model can take at most, or None if it is not for us."""
        try:
            shown = await self._client.show(model)
        except ollama.ResponseError:
            return None  # Removed since it was listed, or broken: the others are still good.
        except pydantic.ValidationError:
            return self._context_tokens  # The client insists on fields that the server may omit.
        remote = getattr(shown, "remote_host", None) or model.endswith(("-cloud", ":cloud"))
        if remote or (shown.capabilities and "completion" not in shown.capabilities):
            return None
        if self._context_tokens:
            return self._context_tokens
        lengths = (shown.modelinfo or {}).items()
        return next((int(n) for key, n in lengths if key.endswith(".context_length")), 0)

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
        if error.status_code in (400, 404, 413, 422):
            return PromptRefused(f"{self._name} refused the prompt: {why}. Change it or the model")
        if error.status_code in (429, 503):
            return ComputeBusy(f"{self._name} is busy: {why}. Ask later or elsewhere")
        return failed(f"{self._name} failed", why=why, todo="See its log, and ask again")


def _first(models: list[ModelInfo], name: str) -> str:
    if not models:
        why, todo = "it has no model of its own", "Run `ollama pull` with the name of one"
        raise failed(f"{name} cannot answer", why=why, todo=todo)
    return models[0].name


def _info(entry: Any, context_tokens: int, loaded: bool) -> ModelInfo:
    return ModelInfo(
        name=entry.model,
        digest=entry.digest or "",
        quantisation=(entry.details.quantization_level or "") if entry.details else "",
        context_tokens=context_tokens,
        loaded=loaded,
        size_bytes=int(entry.size or 0),
    )


def _chunk(part: Any) -> Chunk:
    text = part.message.content if hasattr(part, "message") else part.response
    logprobs = tuple(Logprob(entry.token, entry.logprob) for entry in part.logprobs or ())
    return Chunk(text=text or "", tokens=len(logprobs) or (1 if text else 0), logprobs=logprobs)


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
        tokens=chunk.tokens + output_tokens - counted,
        done=True,
        done_reason=reason,
        usage=usage,
        logprobs=chunk.logprobs,
    )
