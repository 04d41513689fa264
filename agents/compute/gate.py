"""What every backend needs around its engine: a bounded queue, time-outs and a measured pace."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic_ns
from typing import TYPE_CHECKING, Final, TypeVar

from .ports import Chunk, ComputeBusy, Estimate, Prompt, Usage, failed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

T = TypeVar("T")
# Four slots keep a small machine busy: on two cores four at once give about twice the tokens.
CONCURRENCY_DEFAULT: Final = 4
# Whoever is further back than this is better served elsewhere, and is told so at once.
QUEUE_MAX_DEFAULT: Final = 64
# A big model is read from a slow disk within this; a prompt that fills its context too.
FIRST_CHUNK_MAX_S: Final = 120
# Between two tokens even a laptop that swaps needs less.
NEXT_CHUNK_MAX_S: Final = 30
# Guesses for an engine that has not been measured yet: a small model on two cores.
READ_GUESS_US: Final = 2_000
WRITE_GUESS_US: Final = 10_000
READ_MEASURED_MIN_TOKENS: Final = 16  # Fewer say more about the first token than of reading.
LOAD_GUESS_BYTES_PER_MS: Final = 500_000  # A laptop's SSD reads 0.5 GB a second.
BYTES_PER_TOKEN: Final = 4  # English under the usual byte-pair encodings.
TOKENS_PER_MESSAGE: Final = 5  # Role names and separators of the usual chat templates.
TOKENS_PER_IMAGE: Final = 1_000  # Models differ: from 64 to some thousands.


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a backend takes on, and how long it waits for its engine."""

    concurrency: int = CONCURRENCY_DEFAULT
    queue_max: int = QUEUE_MAX_DEFAULT
    first_chunk_max_s: float = FIRST_CHUNK_MAX_S
    next_chunk_max_s: float = NEXT_CHUNK_MAX_S


class Pace:
    """How long the engine takes per token, learnt from the requests that it served."""

    def __init__(self) -> None:
        self.requests = 0
        self.write_us = WRITE_GUESS_US
        self.read_us = READ_GUESS_US

    def learn(self, usage: Usage, *, rest_ms: int) -> None:
        """Take a finished request, ``rest_ms`` of it after the first token, into the average."""
        self.requests += 1
        read_tokens = usage.input_tokens - usage.cached_input_tokens
        if read_tokens >= READ_MEASURED_MIN_TOKENS:
            read_us = max(0, usage.duration_ms - rest_ms) * 1000 // read_tokens
            self.read_us = self._mix(self.read_us, read_us)
        if usage.output_tokens > 1:
            write_us = rest_ms * 1000 // (usage.output_tokens - 1)
            self.write_us = self._mix(self.write_us, write_us)

    def _mix(self, old_us: int, new_us: int) -> int:
        return new_us if self.requests == 1 else (3 * old_us + new_us) // 4

    def expected_ms(self, *, input_tokens: int, output_tokens: int) -> int:
        """Return how long such a request takes once it is its turn."""
        return (input_tokens * self.read_us + output_tokens * self.write_us) // 1000

    @property
    def basis(self) -> str:
        """What the numbers rest on, in words."""
        if self.requests == 0:
            return "guessed for a small model on two cores: nothing measured yet"
        return (
            f"measured over {self.requests} request{'s' * (self.requests > 1)} here: "
            f"{self.read_us} us per token read, {self.write_us} us per token written"
        )


def guess_tokens(prompt: Prompt) -> int:
    """Return about how many tokens the prompt is, for engines that do not count ahead."""
    text_tokens = prompt.size_bytes() // BYTES_PER_TOKEN
    turns_tokens = TOKENS_PER_MESSAGE * len(prompt.messages)
    return text_tokens + turns_tokens + TOKENS_PER_IMAGE * len(prompt.images) + 1


class Gate:
    """Lets a bounded number of streams through and watches each for silence."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.pace = Pace()
        self._slots = asyncio.Semaphore(limits.concurrency)
        self.inside = 0

    def estimated(
        self, prompt: Prompt, *, input_tokens: int, exact: bool, loading_ms: int
    ) -> Estimate:
        """Return the estimate for a prompt of so many tokens, behind what is queued now."""
        own_ms = self.pace.expected_ms(input_tokens=input_tokens, output_tokens=prompt.max_tokens)
        # Whoever is inside is taken to be like this one; so many are served at a time.
        turns = self.inside // self.limits.concurrency
        return Estimate(
            input_tokens=input_tokens,
            input_tokens_exact=exact,
            expected_ms=loading_ms + (turns + 1) * own_ms,
            loading_ms=loading_ms,
            queued=self.inside,
            basis=self.pace.basis,
        )

    async def run(
        self, prompt: Prompt, open_stream: Callable[[], AsyncGenerator[Chunk, None]]
    ) -> AsyncGenerator[Chunk, None]:
        """Yield what ``open_stream`` yields, when it is its turn.

        :raises ComputeBusy: if too many wait already
        :raises ComputeFailed: if the engine is silent for too long, or ends without a last chunk
        """
        prompt.check()
        self._enter()
        try:
            async with self._slots, aclosing(open_stream()) as source:
                async for chunk in self._watched(source):
                    yield chunk
        finally:
            self.inside -= 1

    async def once(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return what ``work`` returns, when it is its turn.

        :raises ComputeBusy: if too many wait already
        :raises ComputeFailed: if it takes longer than a first token may
        """
        self._enter()
        try:
            async with self._slots:
                try:
                    async with asyncio.timeout(self.limits.first_chunk_max_s):
                        return await work()
                except TimeoutError:
                    why = f"no answer came within {self.limits.first_chunk_max_s} s"
                    raise failed(
                        f"{self.name} is silent", why=why, todo="Ask for less at once"
                    ) from None
        finally:
            self.inside -= 1

    def _enter(self) -> None:
        if self.inside >= self.limits.concurrency + self.limits.queue_max:
            raise ComputeBusy(
                f"{self.name} is busy: {self.inside} requests run or wait already. "
                "Ask later or elsewhere"
            )
        self.inside += 1

    async def _watched(self, source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        first_ns, wait_s, which = 0, self.limits.first_chunk_max_s, "first"
        while True:
            try:
                # The time-out spans one step only: none may stay open across a yield.
                async with asyncio.timeout(wait_s):
                    chunk = await anext(source, None)
            except TimeoutError:
                raise failed(
                    f"{self.name} is silent",
                    why=f"its {which} token did not come within {wait_s} s",
                    todo="The machine may be overloaded or the model still be loading: "
                    "ask again, or take a smaller model",
                ) from None
            if chunk is None:
                raise failed(
                    f"{self.name} stopped in the middle of an answer",
                    why="its stream ended without a last chunk",
                    todo="It may have crashed or been stopped: see that it runs and ask again",
                )
            if not first_ns:
                first_ns = monotonic_ns()
                wait_s, which = self.limits.next_chunk_max_s, "next"
            if chunk.done and chunk.usage is not None:
                rest_ms = (monotonic_ns() - first_ns) // 1_000_000
                self.pace.learn(chunk.usage, rest_ms=rest_ms)
            yield chunk
            if chunk.done:
                return
