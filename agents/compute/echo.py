"""An engine for tests: it answers with the words of the question, the same every time."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from typing import TYPE_CHECKING

import anyio

from .gate import Gate, Limits
from .ports import (
    Chunk,
    Compute,
    DoneReason,
    Estimate,
    Logprob,
    ModelInfo,
    Prompt,
    PromptRefused,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_MODEL = "echo"
_CONTEXT_TOKENS = 1_000_000


class EchoCompute(Compute):
    """Gives the last message back, one word a token; a seed above 0 turns the words round.

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
        return [ModelInfo(name=_MODEL, digest=digest, context_tokens=_CONTEXT_TOKENS, loaded=True)]

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
        words = _answer(prompt)
        shown = words[: prompt.max_tokens]
        for text in shown:
            await anyio.sleep(self._chunk_delay_s)  # A checkpoint even at 0.
            self.written += 1
            logprobs = (Logprob(text, 0),) if prompt.logprobs else ()
            yield Chunk(text=text, tokens=1, logprobs=logprobs)
        reason: DoneReason = "stop" if len(shown) == len(words) else "length"
        usage = Usage(input_tokens=_input_tokens(prompt), output_tokens=len(shown))
        yield Chunk(done=True, done_reason=reason, usage=usage)

    async def close(self) -> None:
        """Do nothing: it holds nothing."""


def _input_tokens(prompt: Prompt) -> int:
    texts = [prompt.text, *(message.content for message in prompt.messages)]
    return sum(len(text.split()) for text in texts)


def _answer(prompt: Prompt) -> list[str]:
    """Return the tokens of the answer; one that was begun is gone on with."""
    messages, begun = prompt.messages, ""
    if len(messages) > 1 and messages[-1].role == "assistant":
        *messages_before, last = messages
        messages, begun = tuple(messages_before), last.content
    text = prompt.text or messages[-1].content
    if prompt.response_schema is not None:
        return [json.dumps({"echo": text})]
    for stop in prompt.stop:
        text = text.partition(stop)[0]
    words = text.split()
    turn = (prompt.seed or 0) % len(words) if words else 0
    whole = " ".join(words[turn:] + words[:turn])
    return re.findall(r"\s*\S+", whole.removeprefix(begun))
