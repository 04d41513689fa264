"""What every compute backend promises, asked of each of them.

What is real: the embedded engine and its model; the OpenAI-compatible server (llama.cpp's own,
over HTTP); the client libraries. Ollama's server is a front of ours before the real engine, since
none can be installed from a package; see ``OllamaFront``.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing

import pytest

from coase.agents import Agent, Price, Windows
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.gate import Limits
from coase.agents.compute.llamacpp import LlamaCppCompute
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ollama import OllamaCompute
from coase.agents.compute.openai import OpenAICompute
from coase.agents.compute.ports import (
    MESSAGES_MAX,
    OUTPUT_TOKENS_MAX,
    PROMPT_SIZE_MAX_BYTES,
    Compute,
    ComputeBusy,
    Image,
    Message,
    Prompt,
    PromptRefused,
    Tool,
    ToolCall,
    Unsupported,
)
from coase.agents.inference import Stock, inference_agent
from coase.protocol.errors import ComputeFailed
from tests.agents.market import market
from tests.conformance.compute_servers import (
    API_KEY,
    OllamaFront,
    real_engine,
    serving,
    small_model,
)

OpenCompute = Callable[[Limits], Compute]

QUESTIONS = (
    "Why is the sky blue? Tell me about light and air.",
    "Name the colours of the rainbow, one after the other, please.",
    "What do bees do in winter, when there are no flowers around?",
)
LONG = Prompt.ask(
    "Tell me a very long story about a lighthouse. " + "and so on " * 60, max_tokens=400
)
WEATHER = Tool(
    name="get_weather",
    description="The weather of a town",
    parameters={
        "type": "object",
        "properties": {"town": {"$ref": "#/$defs/Town"}},
        "required": ["town"],
        "$defs": {"Town": {"enum": ["Paris", "Ulm"]}},
    },
)
# One grey point.
PICTURE = Image(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
        "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
    )
)


@pytest.fixture(scope="module")
def engine_url() -> Iterator[str]:
    with real_engine() as url:
        yield url


@pytest.mark.anyio
@pytest.mark.xdist_group("compute")
class ComputeSuite:
    """A subclass gives the fixture ``open_compute``, which opens an engine with given limits."""

    @pytest.fixture
    async def compute(self, open_compute: OpenCompute) -> AsyncIterator[Compute]:
        compute = open_compute(Limits())
        yield compute
        await compute.close()

    async def test_the_last_chunk_ends_the_answer_and_the_tokens_add_up(
        self, compute: Compute
    ) -> None:
        prompt = Prompt.ask(QUESTIONS[0], max_tokens=12)
        async with aclosing(compute.stream(prompt)) as stream:
            chunks = [chunk async for chunk in stream]
        assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.input_tokens > 0
        assert sum(chunk.tokens for chunk in chunks) == usage.output_tokens
        whole = await compute.complete(prompt)
        assert whole.text == "".join(chunk.text for chunk in chunks)
        assert whole.usage.output_tokens == usage.output_tokens

    async def test_it_streams_and_does_not_save_up(self, compute: Compute) -> None:
        async with aclosing(compute.stream(Prompt.ask(QUESTIONS[0], max_tokens=8))) as stream:
            assert len([chunk async for chunk in stream if chunk.text]) > 3

    async def test_it_writes_no_more_than_was_asked_for(self, compute: Compute) -> None:
        completion = await compute.complete(Prompt.ask(QUESTIONS[0], max_tokens=5))
        assert completion.usage.output_tokens == 5
        assert completion.done_reason == "length"

    async def test_a_plain_text_is_continued(self, compute: Compute) -> None:
        completion = await compute.complete(Prompt(text="The capital of France is", max_tokens=4))
        assert completion.text
        assert completion.usage.output_tokens <= 5

    async def test_a_stop_text_ends_the_answer_and_is_not_in_it(self, compute: Compute) -> None:
        prompt = Prompt(text="One, two, three, four, five, six,", max_tokens=12, stop=(",",))
        completion = await compute.complete(prompt)
        assert completion.done_reason == "stop"
        assert "," not in completion.text

    async def test_the_same_seed_gives_the_same_text_alone_and_beside_others(
        self, compute: Compute
    ) -> None:
        def ask(question: str) -> Prompt:
            return Prompt.ask(question, max_tokens=12, temperature=0.9, seed=7)

        alone = {question: (await compute.complete(ask(question))).text for question in QUESTIONS}
        crowd = (*QUESTIONS, QUESTIONS[0])
        together = await asyncio.gather(*(compute.complete(ask(question)) for question in crowd))
        assert [one.text for one in together] == [alone[question] for question in crowd]

    async def test_another_seed_gives_another_text(self, compute: Compute) -> None:
        texts = {
            (
                await compute.complete(
                    Prompt.ask(QUESTIONS[0], max_tokens=16, temperature=1.5, seed=seed)
                )
            ).text
            for seed in (1, 2, 3)
        }
        assert len(texts) > 1

    async def test_the_models_that_it_lists_can_be_asked_for(self, compute: Compute) -> None:
        models = await compute.models()
        named = Prompt.ask(QUESTIONS[0], model=models[0].name, max_tokens=4)
        unnamed = Prompt.ask(QUESTIONS[0], max_tokens=4)
        assert (await compute.complete(named)).text == (await compute.complete(unnamed)).text

    async def test_an_estimate_says_what_it_rests_on(self, compute: Compute) -> None:
        prompt = Prompt.ask(QUESTIONS[0], max_tokens=4)
        before = await compute.estimate(prompt)
        taken = (await compute.complete(prompt)).usage.input_tokens
        after = await compute.estimate(prompt)
        assert before.basis
        assert after.basis
        assert after.expected_ms >= 0
        assert not after.input_tokens_exact or after.input_tokens == taken

    async def test_logprobs_come_with_every_token(self, compute: Compute) -> None:
        completion = await compute.complete(Prompt.ask(QUESTIONS[0], max_tokens=6, logprobs=True))
        assert len(completion.logprobs) == completion.usage.output_tokens
        assert all(entry.logprob <= 0 for entry in completion.logprobs)

    async def test_a_schema_binds_the_answer(self, compute: Compute) -> None:
        schema = {
            "type": "object",
            "properties": {"sure": {"type": "boolean"}},
            "required": ["sure"],
        }
        prompt = Prompt.ask("Is water wet?", max_tokens=40, response_schema=schema)
        assert isinstance(json.loads((await compute.complete(prompt)).text), dict)

    async def test_a_tool_that_has_to_be_called_is_called(self, compute: Compute) -> None:
        prompt = Prompt.ask(
            "What is the weather in Paris?",
            tools=(WEATHER,),
            tool_choice="required",
            max_tokens=60,
        )
        async with aclosing(compute.stream(prompt)) as stream:
            chunks = [chunk async for chunk in stream]
        (call,) = [call for chunk in chunks for call in chunk.tool_calls]
        assert call.name == "get_weather"
        assert call.read() in ({"town": "Paris"}, {"town": "Ulm"})
        assert not "".join(chunk.text for chunk in chunks).strip()
        assert chunks[-1].done_reason == "tool_calls"
        usage = chunks[-1].usage
        assert usage is not None
        assert sum(chunk.tokens for chunk in chunks) == usage.output_tokens > 0

    async def test_what_a_tool_gave_is_read(self, compute: Compute) -> None:
        asked = Message("user", "What is the weather in Paris?")
        call = ToolCall(name="get_weather", arguments='{"town": "Paris"}', id="1")
        called = Message("assistant", "", tool_calls=(call,))

        async def read(result: str) -> int:
            given = Message("tool", result, tool_call_id="1", tool_name="get_weather")
            prompt = Prompt(messages=(asked, called, given), tools=(WEATHER,), max_tokens=1)
            return (await compute.complete(prompt)).usage.input_tokens

        assert await read("storm, hail, snow, rain, fog, wind") >= await read("dry") + 5

    async def test_pictures_and_thinking_are_there_or_refused(self, compute: Compute) -> None:
        seen = Prompt(messages=(Message("user", "What is this?", images=(PICTURE,)),))
        for prompt, what in (
            (seen, "vision"),
            (Prompt.ask("Why is it so?", thinking=True, max_tokens=40), "thinking"),
        ):
            able = what in (await compute.models())[0].capabilities
            try:
                made = await compute.complete(prompt)
            except Unsupported:
                assert not able
            else:
                assert made.thinking or what == "vision"
                assert made.text

    async def test_vectors_are_there_or_refused(self, compute: Compute) -> None:
        texts = ("The sky is blue.", "Blue is the sky.", "I owe you five pounds.")
        able = [m.name for m in await compute.models() if "embedding" in m.capabilities]
        if not able:
            with pytest.raises(Unsupported):
                await compute.embed(texts)
            return
        made = await compute.embed(texts)
        assert made.model in able
        assert made.usage.input_tokens > 0
        first, second, third = made.vectors
        assert _cosine(first, second) > _cosine(first, third)
        again = await compute.embed(texts[:1], made.model)
        assert _cosine(first, again.vectors[0]) > 0.999
        for bad in ((), ("",)):
            with pytest.raises(PromptRefused):
                await compute.embed(bad)
        with pytest.raises(ComputeFailed):
            await compute.embed(texts, "no-such-model")

    @pytest.mark.parametrize(
        "broken",
        [
            Prompt(),
            Prompt(text="both", messages=(Message("user", "both"),)),
            Prompt(text="x" * (PROMPT_SIZE_MAX_BYTES + 1)),
            Prompt(messages=(Message("user", "x"),) * (MESSAGES_MAX + 1)),
            Prompt(text="x", max_tokens=0),
            Prompt(text="x", max_tokens=OUTPUT_TOKENS_MAX + 1),
            Prompt(text="x", temperature=-1),
            Prompt(text="x", seed=2**32 - 1),
            Prompt(text="x", stop=("",)),
        ],
        ids="empty both big many none much cold seed stop".split(),
    )
    async def test_a_prompt_beyond_a_limit_is_refused(
        self, compute: Compute, broken: Prompt
    ) -> None:
        with pytest.raises(PromptRefused):
            await compute.complete(broken)
        with pytest.raises(PromptRefused):
            await compute.estimate(broken)

    async def test_whoever_comes_when_the_queue_is_full_is_told_at_once(
        self, open_compute: OpenCompute
    ) -> None:
        compute = open_compute(Limits(concurrency=1, queue_max=0))
        async with aclosing(compute.stream(LONG)) as first:
            await anext(first)
            assert (await compute.estimate(LONG)).queued == 1
            with pytest.raises(ComputeBusy):
                await compute.complete(LONG)
        await compute.complete(Prompt.ask(QUESTIONS[0], max_tokens=2))  # There is room again.
        await compute.close()

    async def test_closed_and_cancelled_streams_free_their_places(
        self, open_compute: OpenCompute
    ) -> None:
        compute = open_compute(Limits(concurrency=2, queue_max=0))
        async with aclosing(compute.stream(LONG)) as left:
            await anext(left)
        begun = asyncio.Event()

        async def read() -> None:
            async with aclosing(compute.stream(LONG)) as stream:
                async for _ in stream:
                    begun.set()

        reading = asyncio.create_task(read())
        await begun.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        short = Prompt.ask(QUESTIONS[0], max_tokens=2)
        await asyncio.gather(compute.complete(short), compute.complete(short))
        await compute.close()

    async def test_closing_twice_is_safe(self, open_compute: OpenCompute) -> None:
        compute = open_compute(Limits())
        await compute.close()
        await compute.close()


def _cosine(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / (math.hypot(*one) * math.hypot(*other))


class TestEcho(ComputeSuite):
    @pytest.fixture
    def open_compute(self) -> OpenCompute:
        return lambda limits: EchoCompute(limits=limits)


class TestLlamaCpp(ComputeSuite):
    @pytest.fixture(scope="class")
    async def kept(self) -> AsyncIterator[Compute]:
        """Hold the engine, which all instances with equal settings share, for all tests."""
        compute = LlamaCppCompute(small_model())
        await compute.start()
        yield compute
        await compute.close()

    @pytest.fixture
    def open_compute(self, kept: Compute) -> OpenCompute:
        return lambda limits: LlamaCppCompute(small_model(), limits=limits)


class TestOpenAI(ComputeSuite):
    @pytest.fixture
    def open_compute(self, engine_url: str) -> OpenCompute:
        return lambda limits: OpenAICompute(
            f"{engine_url}/v1", api_key=API_KEY, limits=limits, calls_by_schema=True
        )

    async def test_pictures_and_thinking_are_there_or_refused(self, compute: Compute) -> None:
        seen = Prompt(messages=(Message("user", "What is this?", images=(PICTURE,)),))
        with pytest.raises(Unsupported, match="image"):
            await compute.complete(seen)


class TestOllama(ComputeSuite):
    @pytest.fixture
    async def open_compute(self, engine_url: str) -> AsyncIterator[OpenCompute]:
        async with serving(OllamaFront(engine_url)) as server:
            yield lambda limits: OllamaCompute(server.url, limits=limits)


class TestMarket(ComputeSuite):
    """Purchases from one seller whose engine is the echo; what it cannot buy, it refuses."""

    @pytest.fixture(scope="class")
    async def buyer(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Agent]:
        """Hold one market for all tests, whose buyer pays for every answer."""
        stock = Stock(await EchoCompute().models())
        patient = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
        seller = inference_agent(
            "seller",
            price=Price.per_task("0.0001"),
            compute=EchoCompute(),
            stock=stock,
            strategy="fixed",
            windows=patient,
            capacity=64,
        )
        buyer = Agent("buyer")
        async with market(tmp_path_factory.mktemp("market")) as place:
            await place.join(seller, buyer)
            yield buyer

    @pytest.fixture
    def open_compute(self, buyer: Agent) -> OpenCompute:
        return lambda limits: MarketCompute(
            buyer, max_price="0.001", limits=limits, decide_after_ms=50
        )

    async def test_it_streams_and_does_not_save_up(self, compute: Compute) -> None:
        words = " ".join(map(str, range(100)))
        async with aclosing(compute.stream(Prompt.ask(words, max_tokens=100))) as stream:
            assert len([chunk async for chunk in stream if chunk.text]) > 3

    async def test_logprobs_come_with_every_token(self, compute: Compute) -> None:
        with pytest.raises(PromptRefused, match="log-probabilities"):
            await compute.complete(Prompt.ask(QUESTIONS[0], max_tokens=6, logprobs=True))

    async def test_pictures_and_thinking_are_there_or_refused(self, compute: Compute) -> None:
        seen = Prompt(messages=(Message("user", "this", images=(PICTURE,)),), thinking="high")
        async with aclosing(compute.stream(seen)) as stream:
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.thinking for chunk in chunks) == "I repeat 1 words. "
        assert "".join(chunk.text for chunk in chunks) == "this (1 images)"

    async def test_vectors_are_there_or_refused(self, compute: Compute) -> None:
        texts = ("The sky is blue.", "I owe you five pounds.")
        bought, made = await compute.embed(texts), await EchoCompute().embed(texts)
        assert bought.usage.input_tokens == made.usage.input_tokens
        assert [_cosine(*both) for both in zip(bought.vectors, made.vectors, strict=True)] == [
            pytest.approx(1, abs=1e-6)
        ] * 2
