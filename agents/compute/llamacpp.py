"""The embedded engine: llama.cpp in a process of its own, shared by the agents of a process."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic_ns
from typing import IO, TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import anyio

from coase.protocol.errors import ComputeFailed

from .calls import described
from .gate import Gate, Limits, guess_tokens
from .gguf import Facts, facts_of
from .model import digest_of
from .openai import OpenAICompute, wire_messages
from .ports import (
    Chunk,
    Compute,
    ComputeBusy,
    Embeddings,
    Estimate,
    ModelInfo,
    Prompt,
    PromptRefused,
    Unsupported,
    check_texts,
    failed,
)
from .template import template_for

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

# SmolLM2 was trained for 8,192, but each slot's share is memory that is taken at once
# (12 KB a token): four slots of 2,048 take 100 MB.
CONTEXT_TOKENS_DEFAULT: Final = 2_048
DYING_MAX_S: Final = 1
STOP_MAX_S: Final = 5
THREADS_MAX: Final = 8  # Beyond it the barriers of a small model cost more than they bring.
LOADING_GUESS_MS: Final = 1_500
LOG_SHOWN_MAX_BYTES: Final = 500
GOMP_ADVICE: Final = (
    "the embedded engine needs the system library libgomp1: run `apt-get install libgomp1`"
)
_ENGINE_SCRIPT: Final = Path(__file__).with_name("engine.py")
_QUANTISATIONS: Final = ("Q", "IQ", "F16", "F32", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one engine process is started with; equal settings share one process."""

    model: Path
    slots: int = 4
    context_tokens: int = CONTEXT_TOKENS_DEFAULT
    threads: int = field(default_factory=lambda: min(len(os.sched_getaffinity(0)), THREADS_MAX))
    embedding: bool = False
    """A process that writes nothing and makes vectors instead."""


class LlamaCppCompute(Compute):
    """Runs one GGUF model on this machine's processor, with nothing else installed.

    The engine starts with the first prompt, or by :meth:`start`. Instances with equal settings
    and limits in one event loop share one engine and its queue; the last to close ends it, and
    an engine that died is started again by the next prompt. With a seed (or temperature 0) the same
    prompt gives the same bytes, also while other prompts run beside it. Schemas, and tools that
    have to be called, bind the answer by a grammar. Vectors are made by a second process, which
    starts with the first text that is embedded: of a model that was made to write, they are the
    mean over its tokens.
    """

    def __init__(
        self,
        model: Path,
        *,
        slots: int = 4,
        context_tokens: int = CONTEXT_TOKENS_DEFAULT,
        limits: Limits | None = None,
    ) -> None:
        self._settings = EngineSettings(model=model, slots=slots, context_tokens=context_tokens)
        self._limits = limits or Limits(concurrency=slots)
        self._shared: _Engine | None = None
        self._embedder: _Engine | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """What it is and where."""
        return _name(self._settings)

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while it runs."""
        return self._shared.pid if self._shared is not None else None

    async def models(self) -> list[ModelInfo]:
        """Return its one model, read from the file; starts nothing."""
        path = self._settings.model
        try:
            stat = path.stat()
            digest = await anyio.to_thread.run_sync(digest_of, path)
            facts = await anyio.to_thread.run_sync(facts_of, path)
        except OSError as error:
            raise _no_model(self._settings, str(error)) from error
        return [
            ModelInfo(
                name=path.stem,
                digest=digest,
                quantisation=_quantisation(path.stem),
                context_tokens=self._settings.context_tokens,
                loaded=self.pid is not None,
                size_bytes=stat.st_size,
                capabilities=facts.capabilities,
                family=facts.architecture,
                parameter_count=facts.parameter_count,
                embedding_length=facts.embedding_length,
                modified_s=int(stat.st_mtime),
            )
        ]

    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return the estimate, with exact tokens if the engine runs already."""
        prompt.check()
        return await self._engine().estimate(prompt)

    async def start(self) -> None:
        """Load the model now rather than with the first prompt. Safe to repeat.

        :raises ComputeFailed: if the engine or the model is missing or does not start
        """
        await self._engine().running()

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is written, starting the engine if need be."""
        engine = self._engine()
        return engine.gate.run(prompt, lambda: engine.write(prompt))

    async def embed(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Return a vector for each text, starting the engine for them if need be."""
        check_texts(texts)
        if self._embedder is None:
            self._embedder = self._take(replace(self._settings, embedding=True))
        engine = self._embedder
        return await engine.gate.once(lambda: engine.embed(texts, model))

    async def close(self) -> None:
        """Let go of the engine; the last one ends it."""
        self._closed = True
        engines, self._shared, self._embedder = (self._shared, self._embedder), None, None
        for engine in engines:
            if engine is None:
                continue
            engine.users -= 1
            if engine.users == 0:
                key = (engine.settings, self._limits)
                _ENGINES[asyncio.get_running_loop()].pop(key, None)
                await engine.stop()

    def _engine(self) -> _Engine:
        if self._shared is None or self._closed:
            self._shared = self._take(self._settings)
        return self._shared

    def _take(self, settings: EngineSettings) -> _Engine:
        if self._closed:
            raise failed(self.name, why="it was closed", todo="Make a new one")
        engines = _ENGINES.setdefault(asyncio.get_running_loop(), {})
        key = (settings, self._limits)
        engine = engines.setdefault(key, _Engine(*key))
        engine.users += 1
        return engine


class _Engine:
    """The process, started when it is needed and again when it died."""

    def __init__(self, settings: EngineSettings, limits: Limits) -> None:
        self.users = 0
        self.gate = Gate(_name(settings), limits)
        self.settings = settings
        self._loading_ms = LOADING_GUESS_MS
        self._address = ""
        self._starting = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._api: OpenAICompute | None = None

    @property
    def pid(self) -> int | None:
        if self._api is None or self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    async def running(self) -> OpenAICompute:
        """Return the API of the running engine, started if need be."""
        async with self._starting:
            if self.pid is None or self._api is None:
                await self.stop()  # What is left of one that died.
                try:
                    self._api = await self._start()
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await self.stop()
                    raise
            return self._api

    async def write(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        name = self.settings.model.stem
        if prompt.model not in (None, name):
            raise PromptRefused(f"{self.gate.name} has no model {prompt.model!r}. Ask for {name!r}")
        await self._require_able(prompt)
        api = await self.running()
        try:
            async with aclosing(api.ungated(prompt)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (PromptRefused, ComputeBusy):
            raise
        except ComputeFailed as error:
            # A dying process closes its connections first and is gone a moment later.
            process = self._process
            if process is not None and await anyio.to_thread.run_sync(_has_ended, process):
                raise failed(
                    f"{self.gate.name} died in the middle of an answer",
                    why=f"exit code {process.returncode}{self._last_words()}",
                    todo="Ask again: it starts anew",
                ) from error
            raise

    async def embed(self, texts: Sequence[str], model: str | None) -> Embeddings:
        name = self.settings.model.stem
        if model not in (None, name):
            raise PromptRefused(f"{self.gate.name} has no model {model!r}. Ask for {name!r}")
        api = await self.running()
        return await api.embed_ungated(texts)

    async def _require_able(self, prompt: Prompt) -> None:
        able = (await self._facts()).capabilities
        lacks = [need for need in prompt.needs() if need not in able]
        if lacks:
            words = {"vision": "takes no images", "thinking": "does not think aloud"}
            words |= {"tools": "calls no tools", "completion": "makes embeddings only"}
            raise Unsupported(f"{self.gate.name} {words[lacks[0]]}. Ask another model or engine")

    async def _facts(self) -> Facts:
        try:
            return await anyio.to_thread.run_sync(facts_of, self.settings.model)
        except OSError as error:
            raise _no_model(self.settings, str(error)) from error

    async def estimate(self, prompt: Prompt) -> Estimate:
        tokens, exact, loading_ms = guess_tokens(prompt), False, self._loading_ms
        if self.pid is not None and self._api is not None:
            loading_ms, exact = 0, True
            if prompt.text:
                text = {"content": prompt.text, "add_special": True}
                tokens = len(
                    (await self._api.ask("POST", f"{self._address}/tokenize", text))["tokens"]
                )
            else:
                await self._require_able(prompt)
                path = "/chat/completions/input_tokens"
                body: dict[str, Any] = {"messages": wire_messages(prompt)}
                if prompt.tools:
                    body["tools"] = [described(tool) for tool in prompt.tools]
                counted = await self._api.ask("POST", path, body)
                tokens = int(counted["input_tokens"])
        return self.gate.estimated(prompt, input_tokens=tokens, exact=exact, loading_ms=loading_ms)

    async def stop(self) -> None:
        """End the process, kindly and then not, and forget it."""
        api, process, log = self._api, self._process, self._log
        self._api = self._process = self._log = None
        if api is not None:
            await api.close()
        if process is not None:
            await anyio.to_thread.run_sync(_end, process)
        if log is not None:
            log.close()

    async def _start(self) -> OpenAICompute:
        begun = monotonic_ns()
        settings = self.settings
        if not settings.model.is_file():
            raise _no_model(settings, f"there is no file {settings.model}")
        facts = await self._facts()
        api_key = secrets.token_hex(16)  # Other users of the machine can reach loopback too.
        self._log = tempfile.TemporaryFile()
        self._process = process = await anyio.to_thread.run_sync(_spawn, self._log)
        line = json.dumps(
            {
                "model": str(settings.model),
                "name": settings.model.stem,
                "slots": settings.slots,
                "context_tokens": settings.context_tokens,
                "threads": settings.threads,
                "api_key": api_key,
                "chat_template": template_for(facts),
                "embedding": settings.embedding,
                "pooled": facts.pooled,
            }
        )
        # Abandoned on cancel: stop() then ends the process, which ends the read.
        answer = await anyio.to_thread.run_sync(_greet, process, line, abandon_on_cancel=True)
        self._address = self._address_in(answer)
        self._loading_ms = (monotonic_ns() - begun) // 1_000_000
        return OpenAICompute(
            f"{self._address}/v1",
            api_key=api_key,
            model=settings.model.stem,
            extra={"timings_per_token": True},
            calls_by_schema=True,
            name=self.gate.name,
            gate=self.gate,
        )

    def _address_in(self, answer: bytes) -> str:
        told = json.loads(answer) if answer else {}
        if "address" in told:
            return str(told["address"])
        why = told.get("why") or "it ended without a word"
        if told.get("error") == "import":
            if "libgomp" in why:
                raise ComputeFailed(GOMP_ADVICE)
            todo = "Run `pip install xllamacpp`, or use Ollama"
            raise failed("the embedded engine is not installed", why=why, todo=todo)
        raise failed(
            f"{self.gate.name} did not start",
            why=why + self._last_words(),
            todo=f"See that {self.settings.model} is a whole GGUF file and that memory is free",
        )

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - LOG_SHOWN_MAX_BYTES))
        words = " ".join(self._log.read().decode("utf-8", "replace").split())
        return f" ({words})" if words else ""


_ENGINES: WeakKeyDictionary[
    asyncio.AbstractEventLoop, dict[tuple[EngineSettings, Limits], _Engine]
] = WeakKeyDictionary()


def _spawn(log: IO[bytes]) -> subprocess.Popen[bytes]:
    # -P: the script's folder is no place to import from (it has an ollama.py). A session of
    # its own: Ctrl-C is for the agents, which then close the engine in good order.
    return subprocess.Popen(
        [sys.executable, "-P", str(_ENGINE_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )


def _greet(process: subprocess.Popen[bytes], line: str) -> bytes:
    if process.stdin is None or process.stdout is None:  # pragma: no cover - both are pipes
        return b""
    with suppress(BrokenPipeError):
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
    return process.stdout.readline()


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(DYING_MAX_S)
    return process.returncode is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(DYING_MAX_S)  # While it still loads it does not read its stdin.
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_MAX_S)
    if process.stdout is not None:
        process.stdout.close()


def _name(settings: EngineSettings) -> str:
    return f"the embedded engine (llama.cpp with {settings.model.stem})"


def _no_model(settings: EngineSettings, why: str) -> ComputeFailed:
    todo = "Run `coase model get`, or name a GGUF file that is there"
    return failed(f"{_name(settings)} has no model", why=why, todo=todo)


def _quantisation(stem: str) -> str:
    last = stem.replace("-", ".").rpartition(".")[2]
    return last if last.upper().startswith(_QUANTISATIONS) else ""
