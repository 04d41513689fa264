"""An engine for tests: it answers with the words of the question, the same every time."""

from __future__ import annotations

import json
import math
import re
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import anyio

from .gate import Gate, Limits
from .ports import (
    Chunk,
    Compute,
    DoneReason,
    Embeddings,
    Estimate,
    Logprob,
    ModelInfo,
    Prompt,
    PromptRefused,
    Tool,
    ToolCall,
    Usage,
    check_texts,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

_MODEL = "echo"
_CONTEXT_TOKENS = 1_000_000
_DIMENSIONS = 16
_DEPTH_MAX = 8  # Of the objects that it makes up; a schema may refer to itself.


class EchoCompute(Compute):
    """Gives the last message back, one word a token; a seed above 0 turns the words round.

    It can all that a prompt may ask for: it counts the pictures that it sees, thinks one thought
    when it is told to think, and calls a tool that it has to, or whose name is in the question.

    Takes ``chunk_delay_s`` before each token, for tests that need an engine which takes time;
    ``written`` counts the tokens of all requests, so that a test sees when the work stopped.
    """

    def __init__(self, *, limits: Limits | None = None, chunk_delay_s: float = 0) -> None:
        self._gate = Gate(self.name, limits or Limits())
        self._chunk_delay_s = chunk_delay_s
        self.written = 0

    @property
    def name(self) -> str:
        """What it is and where."""
        return "echo (no model: it repeats the question)"

    async def models(self) -> list[ModelInfo]:
        """Return its one model, whose digest is that of its name."""
        digest = sha256(_MODEL.encode()).hexdigest()
        return [
            ModelInfo(
                name=_MODEL,
                digest=digest,
                context_tokens=_CONTEXT_TOKENS,
                loaded=True,
                family="echo",
                capabilities=("completion", "tools", "vision", "thinking", "embedding"),
                embedding_length=_DIMENSIONS,
            )
        ]

    async def estimate(self, prompt: Prompt) -> Estimate:
        """Return the exact number of words."""
        prompt.check()
        delay_ms = int(self._chunk_delay_s * 1000)
        return Estimate(
            input_tokens=_input_tokens(prompt),
            input_tokens_exact=True,
            expected_ms=delay_ms * min(len(_answer(prompt)), prompt.max_tokens),
            loading_ms=0,
            queued=self._gate.inside,
            basis="exact: it repeats words",
        )

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the words one by one."""
        return self._gate.run(prompt, lambda: self._write(prompt))

    async def _write(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        if prompt.model not in (None, _MODEL):
            raise PromptRefused(f"the echo has no model {prompt.model!r}. Ask for {_MODEL!r}")
        tool = _called(prompt)
        thoughts = [f"I repeat {_input_tokens(prompt)} words. "] if prompt.thinking else []
        words = _answer(prompt) if tool is None else []
        shown = [*thoughts, *words][: prompt.max_tokens]
        for number, text in enumerate(shown):
            await anyio.sleep(self._chunk_delay_s)  # A checkpoint even at 0.
            self.written += 1
            if number < len(thoughts):
                yield Chunk(thinking=text, tokens=1)
                continue
            logprob = Logprob(text, 0, (Logprob(text, 0),) if prompt.top_logprobs else ())
            yield Chunk(text=text, tokens=1, logprobs=(logprob,) if prompt.logprobs else ())
        reason: DoneReason = "stop" if len(shown) == len(thoughts) + len(words) else "length"
        count = len(shown)
        if tool is not None and reason == "stop":
            arguments = json.dumps(_made_up(tool.parameters, _question(prompt)))
            call = ToolCall(name=tool.name, arguments=arguments, id=f"call_{tool.name}")
            reason, count = "tool_calls", count + 1
            yield Chunk(tool_calls=(call,), tokens=1)
        usage = Usage(input_tokens=_input_tokens(prompt), output_tokens=count)
        yield Chunk(done=True, done_reason=reason, usage=usage)

    async def embed(self, texts: Sequence[str], model: str | None = None) -> Embeddings:
        """Return vectors of length 1 that are near each other where texts share words."""
        check_texts(texts)
        if model not in (None, _MODEL):
            raise PromptRefused(f"the echo has no model {model!r}. Ask for {_MODEL!r}")
        words = sum(len(text.split()) for text in texts)
        return Embeddings(
            vectors=tuple(_vector(text) for text in texts),
            model=_MODEL,
            usage=Usage(input_tokens=words, output_tokens=0),
        )

    async def close(self) -> None:
        """Do nothing: it holds nothing."""


def _input_tokens(prompt: Prompt) -> int:
    texts = [prompt.text, *(message.content for message in prompt.messages)]
    return sum(len(text.split()) for text in texts)


def _question(prompt: Prompt) -> str:
    asked = [m for m in prompt.messages if m.role in ("user", "tool")]
    return asked[-1].content if asked else prompt.text


def _called(prompt: Prompt) -> Tool | None:
    """Return the tool that it calls: the named one, or the first if it has to call one."""
    if not prompt.tools or prompt.tool_choice == "none":
        return None
    question = _question(prompt)
    named = next((tool for tool in prompt.tools if tool.name in question), None)
    if prompt.tool_choice == "required":
        return named or prompt.tools[0]
    return named if prompt.messages[-1].role == "user" else None


def _made_up(schema: Mapping[str, Any], text: str, *, root: Any = None, depth: int = 0) -> Any:
    """Return something that fits a simple schema, with ``text`` where a text is wanted."""
    root = schema if root is None else root
    if "$ref" in schema and depth < _DEPTH_MAX:
        target = root
        for key in str(schema["$ref"]).split("/")[1:]:
            target = target.get(key, {})
        return _made_up(target, text, root=root, depth=depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    numbers = [int(word) for word in re.findall(r"-?\d+", text)]
    match schema.get("type", "object" if "properties" in schema else "string"):
        case "integer" | "number":
            return numbers[0] if numbers else 0
        case "boolean":
            return True
        case "array":
            return [_made_up(schema.get("items", {}), text, root=root, depth=depth + 1)]
        case "null":
            return None
        case "object":
            properties = schema.get("properties", {}) if depth < _DEPTH_MAX else {}
            found: dict[str, Any] = {}
            for name, part in properties.items():
                found[name] = _made_up(part, text, root=root, depth=depth + 1)
                if isinstance(found[name], int) and part.get("type") in ("integer", "number"):
                    # The second number of the question for the second one that is wanted.
                    text = re.sub(r"-?\d+", "", text, count=1) if len(numbers) > 1 else text
            return found
    return text


def _vector(text: str) -> tuple[float, ...]:
    sums = [0] * _DIMENSIONS
    for word in text.lower().split():
        for at, byte in enumerate(sha256(word.encode()).digest()[:_DIMENSIONS]):
            sums[at] += byte - 127
    length = math.sqrt(sum(part * part for part in sums)) or 1
    return tuple(part / length for part in sums)


def _answer(prompt: Prompt) -> list[str]:
    """Return the tokens of the answer; one that was begun is gone on with."""
    messages, begun = prompt.messages, ""
    if len(messages) > 1 and messages[-1].role == "assistant":
        *messages_before, last = messages
        messages, begun = tuple(messages_before), last.content
    text = prompt.text or messages[-1].content
    if prompt.images:
        text = f"{text} ({len(prompt.images)} images)".strip()
    if prompt.response_schema is not None:
        if prompt.response_schema.get("properties"):
            return [json.dumps(_made_up(prompt.response_schema, text))]
        return [json.dumps({"echo": text})]
    for stop in prompt.stop:
        text = text.partition(stop)[0]
    words = text.split()
    turn = (prompt.seed or 0) % len(words) if words else 0
    whole = " ".join(words[turn:] + words[:turn])
    return re.findall(r"\s*\S+", whole.removeprefix(begun))
