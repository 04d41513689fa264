"""The compute port: what an engine that turns prompts into text promises.

Every backend streams. Whoever stops reading closes the stream, and that stops the engine::

    async with aclosing(compute.stream(Prompt.ask("Why is the sky blue?"))) as chunks:
        async for chunk in chunks:
            print(chunk.text, end="")

Durations are whole milliseconds, so that a price per second never passes through a float.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from coase.protocol.errors import ComputeFailed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

# A megabyte of English is about 250,000 tokens: more than the context of the models that
# people run at home, and small enough to be held in memory for every queued request.
PROMPT_SIZE_MAX_BYTES: Final = 1024 * 1024
MESSAGES_MAX: Final = 1_024
OUTPUT_TOKENS_MAX: Final = 32_768
OUTPUT_TOKENS_DEFAULT: Final = 256
STOPS_MAX: Final = 16
STOP_SIZE_MAX_BYTES: Final = 256
SCHEMA_SIZE_MAX_BYTES: Final = 64 * 1024
# llama.cpp takes 2**32 - 1 to mean "any seed"; such a seed would not repeat.
SEED_MAX: Final = 2**32 - 2
TEMPERATURE_MAX: Final = 2.0

Role = Literal["system", "user", "assistant"]
DoneReason = Literal["", "stop", "length"]


class ComputeBusy(ComputeFailed):
    """As many requests run and wait as this engine takes; another engine, or later."""


class PromptRefused(ComputeFailed):
    """This prompt cannot be served here, and repeating it will not help."""


def failed(what: str, *, why: str, todo: str) -> ComputeFailed:
    """Return the error that says what failed, why, and what to do about it."""
    return ComputeFailed(f"{what}: {why.rstrip('.')}. {todo}")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to ask: a conversation, or a plain text that is continued without a template.

    If the last message is the assistant's, the engine goes on where it ends (a backend that
    cannot says so).
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    model: str | None = None
    """Name of a model of this backend; None is the backend's own choice."""
    max_tokens: int = OUTPUT_TOKENS_DEFAULT
    temperature: float = 0.0
    """0 takes the likeliest token each time, so that the answer is the same on repeats."""
    seed: int | None = None
    """With it, the same engine and prompt give the same text; without, chance decides."""
    stop: tuple[str, ...] = ()
    response_schema: Mapping[str, Any] | None = field(default=None, hash=False)
    """JSON Schema that the text has to follow."""
    logprobs: bool = False
    """Ask for the log-probability of every token; engines without it give none."""

    @classmethod
    def ask(cls, question: str, *, system: str = "", **options: Any) -> Prompt:
        """Return a prompt of one question, with the other fields given by name."""
        head = (Message("system", system),) if system else ()
        return cls(messages=(*head, Message("user", question)), **options)

    def size_bytes(self) -> int:
        """Return the size of what the model is to read, in UTF-8."""
        parts = [self.text, *(message.content for message in self.messages)]
        return sum(len(part.encode("utf-8", "surrogatepass")) for part in parts)

    def check(self) -> None:
        """Return if the prompt keeps the limits of the port.

        :raises PromptRefused: with the limit that it breaks
        """
        for broken, why in (
            (bool(self.messages) == bool(self.text), "it needs either messages or a text"),
            (len(self.messages) > MESSAGES_MAX, f"it has over {MESSAGES_MAX} messages"),
            (
                self.size_bytes() > PROMPT_SIZE_MAX_BYTES,
                f"its text is over {PROMPT_SIZE_MAX_BYTES} bytes",
            ),
            (
                not 1 <= self.max_tokens <= OUTPUT_TOKENS_MAX,
                f"max_tokens is {self.max_tokens}, not within 1 to {OUTPUT_TOKENS_MAX}",
            ),
            (
                not 0 <= self.temperature <= TEMPERATURE_MAX,
                f"temperature is {self.temperature}, not within 0 to {TEMPERATURE_MAX}",
            ),
            (
                self.seed is not None and not 0 <= self.seed <= SEED_MAX,
                f"seed is {self.seed}, not within 0 to {SEED_MAX}",
            ),
            (len(self.stop) > STOPS_MAX, f"it has over {STOPS_MAX} stop texts"),
            (
                any(not 0 < len(stop.encode()) <= STOP_SIZE_MAX_BYTES for stop in self.stop),
                f"a stop text is empty or over {STOP_SIZE_MAX_BYTES} bytes",
            ),
        ):
            if broken:
                raise PromptRefused(f"the prompt cannot be run: {why}. Change it and ask again")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One model that this backend can run."""

    name: str
    digest: str = ""
    """SHA-256 of the model file in hex, where the engine tells it; else empty."""
    quantisation: str = ""
    context_tokens: int = 0
    """What one request may take, prompt and answer together; 0 if the engine does not say."""
    loaded: bool | None = None
    """None if the engine does not say."""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a prompt will take here, and what that number rests on."""

    input_tokens: int
    input_tokens_exact: bool
    """True if the model's own tokenizer counted them."""
    expected_ms: int
    """From now until the last token: queue, loading, reading and writing."""
    loading_ms: int
    queued: int
    """Requests that run or wait before this one."""
    basis: str
    """In words, for people: measured over so many requests, or guessed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request took. The engine counts; a buyer who pays by it should count himself."""

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int = 0
    """Part of the input that the engine still knew from an earlier request."""
    duration_ms: int = 0
    """Reading and writing, without the queue and without loading the model."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of the probability that the model gave a token it wrote."""

    token: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of the answer. Exactly the last one is ``done`` and carries the usage.

    The tokens of all chunks add up to the output tokens of the usage.
    """

    text: str = ""
    tokens: int = 0
    done: bool = False
    done_reason: DoneReason = ""
    usage: Usage | None = None
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    done_reason: DoneReason
    usage: Usage
    logprobs: tuple[Logprob, ...] = ()


class Compute(ABC):
    """Runs prompts on a model, several at once, and stops when nobody reads any more."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is and where, in a few words for people."""

    @abstractmethod
    async def models(self) -> list[ModelInfo]:
        """Return the models that can be named in a prompt, the default one first.

        :raises ComputeFailed: if the engine cannot be asked
        """

    @abstractmethod
    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return what ``prompt`` would take if it were asked now. Runs and loads nothing.

        :raises PromptRefused: if it breaks a limit
        :raises ComputeFailed: if the engine cannot be asked
        """

    @abstractmethod
    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is written; the last chunk is ``done``.

        Closing the generator, or cancelling the task that reads it, stops the engine's work.
        A stream that ends early raises: what came before is what the engine had written.

        :raises PromptRefused: if the prompt breaks a limit or does not fit the model
        :raises ComputeBusy: if too many wait already
        :raises ComputeFailed: if the engine is missing, fails, dies, or is silent for too long
        """

    @abstractmethod
    async def close(self) -> None:
        """Give back everything it holds and end what runs. Safe to repeat."""

    async def complete(
        self, prompt: Prompt, *, on_chunk: Callable[[Chunk], object] = lambda chunk: None
    ) -> Completion:
        """Return the whole answer; raises what :meth:`stream` raises.

        ``on_chunk`` is given each part as it comes.
        """
        texts: list[str] = []
        logprobs: list[Logprob] = []
        async with aclosing(self.stream(prompt)) as chunks:
            async for chunk in chunks:
                texts.append(chunk.text)
                logprobs.extend(chunk.logprobs)
                on_chunk(chunk)
                if chunk.done and chunk.usage is not None:
                    return Completion(
                        text="".join(texts),
                        done_reason=chunk.done_reason,
                        usage=chunk.usage,
                        logprobs=tuple(logprobs),
                    )
        raise failed(
            f"{self.name} gave half an answer", why="its stream had no end", todo="Ask again"
        )
