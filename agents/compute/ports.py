"""The compute port: what an engine that turns prompts into text promises.

Every backend streams. Whoever stops reading closes the stream, and that stops the engine::

    async with aclosing(compute.stream(Prompt.ask("Why is the sky blue?"))) as chunks:
        async for chunk in chunks:
            print(chunk.text, end="")

Durations are whole milliseconds, so that a price per second never passes through a float.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import pydantic_core

from coase.protocol.errors import ComputeFailed

from .schemas import fault_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

    from .explain import Explanation

# A megabyte of English is about 250,000 tokens: more than the context of the models that
# people run at home, and small enough to be held in memory for every queued request.
PROMPT_SIZE_MAX_BYTES: Final = 1024 * 1024
MESSAGES_MAX: Final = 1_024
OUTPUT_TOKENS_MAX: Final = 32_768
OUTPUT_TOKENS_DEFAULT: Final = 256
STOPS_MAX: Final = 16
STOP_SIZE_MAX_BYTES: Final = 256
SCHEMA_SIZE_MAX_BYTES: Final = 64 * 1024
SCHEMA_DEPTH_MAX: Final = 64  # Readers of schemas recurse; a person writes five levels.
# Programs that hand a model all of their functions have some dozens.
TOOLS_MAX: Final = 128
TOOL_CALLS_MAX: Final = 64  # In one message.
TOOL_NAME_MAX_CHARS: Final = 64  # What the APIs of others allow.
# A telephone's photograph has 2 to 5 MB. All of them together, as base64, fit twice into the
# largest body that travels to a seller.
IMAGES_MAX: Final = 16
IMAGE_SIZE_MAX_BYTES: Final = 8 * 1024 * 1024
IMAGES_SIZE_MAX_BYTES: Final = 12 * 1024 * 1024
TOP_LOGPROBS_MAX: Final = 20
TOP_K_MAX: Final = 1_000
PENALTY_MAX_PERMILLE: Final = 2_000
# By the name of the field: the least and the most that it may be.
SAMPLING_PERMILLE: Final = {
    "top_p_permille": (0, 1_000),
    "min_p_permille": (0, 1_000),
    "frequency_penalty_permille": (-PENALTY_MAX_PERMILLE, PENALTY_MAX_PERMILLE),
    "presence_penalty_permille": (-PENALTY_MAX_PERMILLE, PENALTY_MAX_PERMILLE),
    "repeat_penalty_permille": (0, PENALTY_MAX_PERMILLE),
}
EMBED_TEXTS_MAX: Final = 2_048
# Libraries send a thousand pieces of some thousand letters at once.
EMBED_SIZE_MAX_BYTES: Final = 4 * 1024 * 1024
DIMENSIONS_MAX: Final = 16_384
# llama.cpp takes 2**32 - 1 to mean "any seed"; such a seed would not repeat.
SEED_MAX: Final = 2**32 - 2
TEMPERATURE_MAX: Final = 2.0

Role = Literal["system", "user", "assistant", "tool"]
DoneReason = Literal["", "stop", "length", "tool_calls"]
Capability = Literal["completion", "tools", "vision", "thinking", "embedding"]
ToolChoice = Literal["auto", "none", "required"]
Thinking = bool | Literal["low", "medium", "high"] | None
_TOOL_NAME: Final = re.compile(rf"[A-Za-z0-9_.:-]{{1,{TOOL_NAME_MAX_CHARS}}}")
# An escaped character that is none of these, two halves that belong together, or a lone half.
_HALF: Final = re.compile(
    rb"(\\[^u])|(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
_MEDIA_TYPES: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
)


class ComputeBusy(ComputeFailed):
    """As many requests run and wait as this engine takes; another engine, or later."""


class PromptRefused(ComputeFailed):
    """This prompt cannot be served here, and repeating it will not help."""


class PromptTooLong(PromptRefused):
    """It, or it with the answer, does not fit the model; a shorter one may."""


class Unsupported(PromptRefused):
    """This engine or model has no such ability; another may have it."""


def read_json(text: str | bytes) -> Any:
    """Return what a text that strangers wrote holds as JSON.

    The standard library's reader recurses as deep as the interpreter allows; some libraries raise
    that limit so far that the stack ends first, and with it the process. Halves of characters,
    which programs leave where they cut a text, become question marks.

    :raises ValueError: if it is none, or too deep
    """
    try:
        return pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        if "hex escape" not in str(error):
            raise
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    return pydantic_core.from_json(_HALF.sub(_whole_or_not, raw), allow_inf_nan=False)


def _whole_or_not(found: re.Match[bytes]) -> bytes:
    return found[0] if found[1] or found[2] else b"?"


def failed(what: str, *, why: str, todo: str) -> ComputeFailed:
    """Return the error that says what failed, why, and what to do about it."""
    return ComputeFailed(f"{what}: {why.rstrip('.')}. {todo}")


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a message, as the bytes of its file."""

    data: bytes = field(repr=False)

    @property
    def media_type(self) -> str:
        """What kind of picture the first bytes say it is; empty if they say nothing known."""
        if self.data[:4] == b"RIFF" and self.data[8:12] == b"WEBP":
            return "image/webp"
        return next((kind for magic, kind in _MEDIA_TYPES if self.data.startswith(magic)), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may ask to be called; whoever asked calls it, not the engine."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """JSON Schema of the object that it is called with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a function that the model wants."""

    name: str
    arguments: str = "{}"
    """A JSON object, as the model wrote it: mostly, but not surely, one that can be read."""
    id: str = ""

    def read(self) -> dict[str, Any] | None:
        """Return the arguments, or None if the model wrote no JSON object."""
        try:
            found = read_json(self.arguments or "{}")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    images: tuple[Image, ...] = field(default=(), kw_only=True)
    thinking: str = field(default="", kw_only=True)
    """What the model thought before it said ``content``."""
    tool_calls: tuple[ToolCall, ...] = field(default=(), kw_only=True)
    """What the model, in this turn of its own, wanted to be called."""
    tool_call_id: str = field(default="", kw_only=True)
    """In a turn of the role ``tool``: the call that ``content`` is the result of."""
    tool_name: str = field(default="", kw_only=True)

    def size_bytes(self) -> int:
        """Return the size of its text, in UTF-8."""
        texts = [self.content, self.thinking]
        texts += [text for call in self.tool_calls for text in (call.name, call.arguments)]
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


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
    top_logprobs: int = 0
    """And for those of so many tokens that could have stood there instead."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    """Whether tools are called. To force one, give it alone and ``required``."""
    thinking: Thinking = None
    """Whether, or how hard, a model that can do so thinks first; None is as it likes."""
    top_k: int | None = None
    """This and what follows narrow the choice of the next token; None leaves it to the engine."""
    top_p_permille: int | None = None
    min_p_permille: int | None = None
    frequency_penalty_permille: int | None = None
    presence_penalty_permille: int | None = None
    repeat_penalty_permille: int | None = None

    @classmethod
    def ask(cls, question: str, *, system: str = "", **options: Any) -> Prompt:
        """Return a prompt of one question, with the other fields given by name."""
        head = (Message("system", system),) if system else ()
        return cls(messages=(*head, Message("user", question)), **options)

    def size_bytes(self) -> int:
        """Return the size of the text that the model is to read, in UTF-8, without images."""
        size = len(self.text.encode("utf-8", "surrogatepass"))
        size += sum(message.size_bytes() for message in self.messages)
        if self.tool_choice != "none":
            size += sum(len(json.dumps(_described(tool))) for tool in self.tools)
        return size

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures of the conversation."""
        return tuple(image for message in self.messages for image in message.images)

    def sampling(self) -> dict[str, float]:
        """Return what of the sampling was asked for, by the names that the engines give it."""
        found: dict[str, float] = {} if self.top_k is None else {"top_k": self.top_k}
        for name in SAMPLING_PERMILLE:
            permille = getattr(self, name)
            if permille is not None:
                found[name.removesuffix("_permille")] = permille / 1_000
        return found

    def needs(self) -> tuple[Capability, ...]:
        """Return what a model must be able to do to serve it."""
        found: list[Capability] = ["completion"]
        if self.tools and self.tool_choice != "none":
            found.append("tools")
        if self.images:
            found.append("vision")
        if self.thinking:
            found.append("thinking")
        return tuple(found)

    def check(self) -> None:
        """Return if the prompt keeps the limits of the port.

        :raises PromptRefused: with the limit that it breaks
        """
        if self.size_bytes() > PROMPT_SIZE_MAX_BYTES:
            raise PromptTooLong(
                f"the prompt cannot be run: its text is over {PROMPT_SIZE_MAX_BYTES} bytes. "
                "Shorten it and ask again"
            )
        for why in (*self._broken(), *self._broken_parts()):
            raise PromptRefused(f"the prompt cannot be run: {why}. Change it and ask again")
        if self.response_schema is not None:
            check_schema(self.response_schema, what="the schema of the answer")

    def _broken(self) -> Iterator[str]:
        if bool(self.messages) == bool(self.text):
            yield "it needs either messages or a text"
        if len(self.messages) > MESSAGES_MAX:
            yield f"it has over {MESSAGES_MAX} messages"
        for name, value, least, most in (
            ("max_tokens", self.max_tokens, 1, OUTPUT_TOKENS_MAX),
            ("temperature", self.temperature, 0, TEMPERATURE_MAX),
            ("seed", self.seed, 0, SEED_MAX),
            ("top_logprobs", self.top_logprobs, 0, TOP_LOGPROBS_MAX),
            ("top_k", self.top_k, 0, TOP_K_MAX),
            *((name, getattr(self, name), *ends) for name, ends in SAMPLING_PERMILLE.items()),
        ):
            if value is not None and not least <= value <= most:
                yield f"{name} is {value}, not within {least} to {most}"
        if len(self.stop) > STOPS_MAX:
            yield f"it has over {STOPS_MAX} stop texts"
        if any(not 0 < len(stop.encode()) <= STOP_SIZE_MAX_BYTES for stop in self.stop):
            yield f"a stop text is empty or over {STOP_SIZE_MAX_BYTES} bytes"

    def _broken_parts(self) -> Iterator[str]:
        images = self.images
        if len(images) > IMAGES_MAX:
            yield f"it has over {IMAGES_MAX} images"
        if any(len(image.data) > IMAGE_SIZE_MAX_BYTES for image in images):
            yield f"an image is over {IMAGE_SIZE_MAX_BYTES >> 20} MiB"
        if sum(len(image.data) for image in images) > IMAGES_SIZE_MAX_BYTES:
            yield f"its images together are over {IMAGES_SIZE_MAX_BYTES >> 20} MiB"
        if any(not image.media_type for image in images):
            yield "an image is no PNG, JPEG, GIF or WebP"
        if any(len(message.tool_calls) > TOOL_CALLS_MAX for message in self.messages):
            yield f"a message has over {TOOL_CALLS_MAX} tool calls"
        if self.text and (self.tools or self.thinking):
            yield "a plain text is gone on with, without tools and without thinking"
        if self.tool_choice == "required" and not self.tools:
            yield "it wants a tool to be called and has none"
        if len(self.tools) > TOOLS_MAX:
            yield f"it has over {TOOLS_MAX} tools"
        if len({tool.name for tool in self.tools}) < len(self.tools):
            yield "two tools have the same name"
        for tool in self.tools:
            if not _TOOL_NAME.fullmatch(tool.name):
                yield f"the tool's name {tool.name[:TOOL_NAME_MAX_CHARS]!r} is none"
            check_schema(tool.parameters, what=f"the schema of the tool {tool.name[:64]!r}")


def check_schema(schema: Mapping[str, Any], *, what: str) -> None:
    """Return if ``schema`` is a JSON Schema that the engines can read.

    :raises PromptRefused: if it is none, too large or too deep
    """
    if not _shallow(schema, 2 * SCHEMA_DEPTH_MAX):
        raise PromptRefused(f"{what} is over {SCHEMA_DEPTH_MAX} levels deep")
    if len(json.dumps(schema)) > SCHEMA_SIZE_MAX_BYTES:
        raise PromptRefused(f"{what} is over {SCHEMA_SIZE_MAX_BYTES >> 10} KiB")
    fault = fault_of(schema, levels=SCHEMA_DEPTH_MAX)
    if fault is not None:
        raise PromptRefused(f"{what} is none: {fault}")


def _shallow(value: Any, levels: int) -> bool:
    """Return whether it is safe to go down to the bottom of a value."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_shallow(part, levels - 1) for part in inner)


def _described(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, **tool.parameters}


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
    capabilities: tuple[Capability, ...] = ("completion",)
    family: str = ""
    """Architecture of the model, such as ``llama``, where the engine tells it."""
    parameter_count: int = 0
    """0 if the engine does not say."""
    embedding_length: int = 0
    modified_s: int = 0
    """When its file was changed last, in Unix seconds; 0 if the engine does not say."""

    @property
    def parameter_size(self) -> str:
        """How many parameters it has, for people: ``135M`` or ``7.6B``."""
        count = self.parameter_count
        for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
            if count >= unit:
                tenths = count * 10 // unit
                whole, tenth = divmod(tenths, 10)
                return f"{whole}.{tenth}{letter}" if whole < 100 and tenth else f"{whole}{letter}"
        return ""


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
    top: tuple[Logprob, ...] = ()
    """The likeliest tokens at this place, if they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of the answer. Exactly the last one is ``done`` and carries the usage.

    The tokens of all chunks add up to the output tokens of the usage, those of thinking and of
    tool calls included. A tool call comes whole, in one chunk.
    """

    text: str = ""
    thinking: str = ""
    """A piece of what the model thinks before it answers; no part of the answer."""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: int = 0
    done: bool = False
    done_reason: DoneReason = ""
    usage: Usage | None = None
    logprobs: tuple[Logprob, ...] = ()
    explanation: Explanation | None = field(default=None, compare=False, repr=False)
    """Why it comes from where it comes, on the first and the last chunk of a routed answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    done_reason: DoneReason
    usage: Usage
    logprobs: tuple[Logprob, ...] = ()
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """One vector for each text, in their order; all of the same length."""

    vectors: tuple[tuple[float, ...], ...]
    model: str
    usage: Usage
    """Its output tokens are 0."""
    explanation: Explanation | None = field(default=None, compare=False, repr=False)
    """Who made them, and who was asked before, where a router knows."""


def check_texts(texts: Sequence[str]) -> None:
    """Return if these texts may be embedded at once.

    :raises PromptRefused: with the limit that they break
    """
    for broken, why in (
        (not texts, "there is no text"),
        (len(texts) > EMBED_TEXTS_MAX, f"there are over {EMBED_TEXTS_MAX} texts"),
        (any(not text for text in texts), "a text is empty"),
        (
            sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
            > EMBED_SIZE_MAX_BYTES,
            f"the texts are over {EMBED_SIZE_MAX_BYTES >> 20} MiB",
        ),
    ):
        if broken:
            raise PromptRefused(f"this cannot be embedded: {why}. Change it and ask again")


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

    async def embed(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Return a vector for each of ``texts``; ``model`` None is the backend's own choice.

        :raises Unsupported: if this engine, or its model, makes none
        :raises PromptRefused: if the texts break a limit or do not fit the model
        :raises ComputeBusy: if too many wait already
        :raises ComputeFailed: if the engine is missing, fails or dies
        """
        check_texts(texts)
        raise Unsupported(f"{self.name} makes no embeddings. Ask an engine that does")

    async def complete(
        self, prompt: Prompt, *, on_chunk: Callable[[Chunk], object] = lambda chunk: None
    ) -> Completion:
        """Return the whole answer; raises what :meth:`stream` raises.

        ``on_chunk`` is given each part as it comes.
        """
        return await whole(self.stream(prompt), name=self.name, on_chunk=on_chunk)


async def whole(
    stream: AsyncGenerator[Chunk, None],
    *,
    name: str,
    on_chunk: Callable[[Chunk], object] = lambda chunk: None,
) -> Completion:
    """Return the answer that a stream of ``name`` gives, and close it.

    :raises ComputeFailed: if the stream has no end
    """
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    logprobs: list[Logprob] = []
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            texts.append(chunk.text)
            thoughts.append(chunk.thinking)
            calls.extend(chunk.tool_calls)
            logprobs.extend(chunk.logprobs)
            on_chunk(chunk)
            if chunk.done and chunk.usage is not None:
                return Completion(
                    text="".join(texts),
                    done_reason=chunk.done_reason,
                    usage=chunk.usage,
                    logprobs=tuple(logprobs),
                    thinking="".join(thoughts),
                    tool_calls=tuple(calls),
                )
    raise failed(f"{name} gave half an answer", why="its stream had no end", todo="Ask again")
