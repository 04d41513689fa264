"""Prompts with tools, schemas and thinking, and texts for vectors, bought where sellers fail."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coase.agents import Agent, BudgetExhausted, Job, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import MarketCompute, Seam
from coase.agents.compute.ports import (
    Image,
    Message,
    ModelInfo,
    Prompt,
    Tool,
    ToolCall,
    Unsupported,
)
from coase.agents.compute.scout import told_of
from coase.agents.inference import Stock, inference_agent, packed
from coase.agents.seller import Windows
from coase.agents.transcript import MARK
from coase.agents.wares import Completion, Embedding, Inference, Vectors
from coase.protocol.errors import ComputeFailed
from coase.protocol.messages import Description
from tests.agents.market import Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.compute.ports import Chunk

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PATIENT = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
TEXTS = ("the sky is blue", "you owe me five pounds")
SUM = Tool(
    name="add",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running
        await running.rest()


def seller_of(name: str, *models: ModelInfo, price: str = "0.01") -> Agent:
    """Return a seller of what an echo writes, which says that it has these models."""
    return inference_agent(
        name,
        price=Price.per_task(price),
        compute=EchoCompute(),
        stock=Stock([*models]),
        strategy="fixed",
        windows=PATIENT,
    )


async def honest() -> Agent:
    return seller_of("honest", *await EchoCompute().models(), price="0.02")


async def read(compute: MarketCompute, prompt: Prompt) -> list[Chunk]:
    async with aclosing(compute.stream(prompt)) as stream:
        return [chunk async for chunk in stream]


async def test_vectors_that_do_not_fit_are_bought_of_the_next_seller(place: Market) -> None:
    cheat, seller, buyer = Agent("cheat"), await honest(), Agent("buyer", budget="0.1")

    @cheat.offers("embedding", price=Price.per_task("0.01"), windows=PATIENT)
    async def embed(task: Embedding, job: Job) -> Vectors:
        return Vectors(vectors=(packed((1.0, 2.0)),), model="m", input_tokens=1)

    await place.join(cheat, seller, buyer)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=500)
    made = await compute.embed(TEXTS)
    assert made.model == "echo"
    assert [len(vector) for vector in made.vectors] == [16, 16]
    assert made.usage.input_tokens == 9


async def test_vectors_of_which_nobody_makes_any_are_not_bought(place: Market) -> None:
    writer = seller_of("writer", ModelInfo(name="echo"), price="0.02")
    poor = Agent("poor", budget="0.001")
    await place.join(writer, poor, Agent("rich"))
    assert [offering.name for offering in writer.offerings.values()] == ["inference"]
    compute = MarketCompute(poor, max_price="0.05", reply_within_ms=200)
    with pytest.raises(ComputeFailed, match="embeddings could not be bought"):
        await compute.embed(TEXTS)
    await place.join(await honest())
    with pytest.raises(BudgetExhausted):
        await MarketCompute(poor, max_price="0.05").embed(TEXTS)


async def test_nobody_bids_for_what_its_model_cannot_do(place: Market) -> None:
    plain = seller_of("plain", ModelInfo(name="echo"))
    buyer = Agent("buyer", budget="0.1")
    await place.join(plain, buyer)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=50, reply_within_ms=200)
    unlooked = Prompt.ask("why?", thinking="low")
    with pytest.raises(ComputeFailed, match="could not be bought"):
        await compute.complete(unlooked)
    await compute.models()
    for prompt, why in (
        (Prompt.ask("add 3 and 4", tools=(SUM,)), "calls tools"),
        (Prompt.ask("why?", thinking="low", model="echo"), "'echo' is not sold .* thinks aloud"),
        (Prompt(messages=(Message("user", "", images=(Image(b"GIF89a"),)),)), "reads images"),
    ):
        with pytest.raises(Unsupported, match=why):
            await compute.complete(prompt)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=50)
    unused = Prompt.ask("add 3 and 4", tools=(SUM,), tool_choice="none")
    assert (await compute.complete(unused)).text == "add 3 and 4"


async def test_who_only_makes_vectors_writes_nothing(place: Market) -> None:
    (info,) = await EchoCompute().models()
    maker = seller_of("maker", replace(info, capabilities=("embedding",)))
    buyer = Agent("buyer", budget="0.1")
    await place.join(maker, buyer)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=50, reply_within_ms=200)
    with pytest.raises(ComputeFailed, match="could not be bought"):
        await compute.complete(Prompt.ask("why?"))
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=50)
    assert len((await compute.embed(TEXTS)).vectors) == 2


async def test_texts_have_the_context_each_for_itself(place: Market) -> None:
    (info,) = await EchoCompute().models()
    small = seller_of("small", replace(info, context_tokens=64))
    buyer = Agent("buyer", budget="0.1")
    await place.join(small, buyer)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=50)
    assert len((await compute.embed(["word " * 40] * 9)).vectors) == 9
    impatient = MarketCompute(buyer, max_price="0.05", reply_within_ms=200)
    with pytest.raises(ComputeFailed, match="could not be bought"):
        await impatient.embed(["word " * 80, "word"])


async def test_models_are_listed_as_their_sellers_describe_them(place: Market) -> None:
    (info,) = await EchoCompute().models()
    told = replace(info, digest="", loaded=None, parameter_count=7, quantisation="Q4_1")
    writer = replace(told, name="writer", capabilities=("completion", "tools"), family="llama")
    maker = replace(told, name="maker", capabilities=("embedding",))
    seller = seller_of("seller", writer, maker)
    silent, buyer = Agent("silent"), Agent("buyer")

    @silent.offers("inference", price=Price.per_task("0.01"), model="plain", windows=PATIENT)
    async def infer(task: Inference, job: Job) -> Completion:
        raise AssertionError

    await place.join(seller, silent, buyer)
    listed = await MarketCompute(buyer, max_price="0.05").models()
    assert listed == [
        ModelInfo(name="plain"),
        replace(writer, embedding_length=0),
        replace(maker, embedding_length=0),
    ]


def test_what_several_sellers_say_of_a_model_is_taken_together() -> None:
    def description(ware: str, models: list[str], traits: list[str]) -> Description:
        return Description(
            agent="a",
            capability=f"{ware}-00000000",
            input_schema="{}",
            output_schema="{}",
            price="1",
            about="",
            models=models,
            traits=traits,
            key="33" * 32,
            firm="",
        )

    hostile = "tools tools context:-1 context:²² parameters:" + "9" * 40 + " family:" + "x" * 90
    told = told_of(
        [
            description("inference", ["a", "b"], ["completion context:9 flavour:sweet"]),
            description("inference", ["a"], ["completion vision context:8"]),
            description("embedding", ["a", "c"], []),
            description("summarise", ["d"], ["completion"]),
            description("inference", ["e"], [hostile]),
        ]
    )
    assert told == {
        "a": ModelInfo(
            name="a", capabilities=("completion", "vision", "embedding"), context_tokens=9
        ),
        "b": ModelInfo(name="b"),
        "c": ModelInfo(name="c", capabilities=("embedding",)),
        "e": ModelInfo(name="e", capabilities=("tools",), family="x" * 32),
    }


async def test_thinking_is_shown_as_such_while_it_is_written(place: Market) -> None:
    buyer = Agent("buyer", budget="0.1")
    await place.join(await honest(), buyer)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=50)
    words = " ".join(f"word{number}" for number in range(60))
    chunks = await read(compute, Prompt.ask(words, thinking="low", max_tokens=100))
    assert "".join(chunk.thinking for chunk in chunks) == "I repeat 60 words. "
    assert "".join(chunk.text for chunk in chunks) == words
    assert not any(chunk.text for chunk in chunks[: _thought(chunks)])


def _thought(chunks: list[Chunk]) -> int:
    return max(at for at, chunk in enumerate(chunks) if chunk.thinking)


async def test_a_tool_call_of_the_next_seller_counts_where_the_first_one_stopped(
    place: Market,
) -> None:
    faulty, seller, buyer = Agent("faulty"), await honest(), Agent("buyer", budget="0.1")

    @faulty.offers("inference", price=Price.per_task("0.01"), windows=PATIENT)
    async def infer(task: Inference, job: Job) -> Completion:
        job.show(f"{MARK}thinking\nwell{MARK}tool_call\n" + '{"name":"add"', tokens=20)
        raise ValueError("no more ideas")

    await place.join(faulty, seller, buyer)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=500)
    chunks = await read(compute, Prompt.ask("please add 3 and 4", tools=(SUM,)))
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert calls == [ToolCall(name="add", arguments='{"a": 3, "b": 4}', id="call_add")]
    assert chunks[-1].done_reason == "tool_calls"
    assert not "".join(chunk.text for chunk in chunks)


async def test_what_a_seller_had_read_before_is_told_and_is_no_more_than_it_read(
    place: Market,
) -> None:
    seller, buyer = Agent("seller"), Agent("buyer", budget="0.1")

    @seller.offers("inference", price=Price.per_task("0.01"), windows=PATIENT)
    async def infer(task: Inference, job: Job) -> Completion:
        cached = int(task.prompt)
        return Completion(
            text="x", model="m", input_tokens=3, output_tokens=1, cached_input_tokens=cached
        )

    await place.join(seller, buyer)
    compute = MarketCompute(buyer, max_price="0.05", decide_after_ms=50)
    for said, told in (("2", 2), ("9", 3)):
        usage = (await compute.complete(Prompt.ask(said))).usage
        assert (usage.input_tokens, usage.cached_input_tokens) == (3, told)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_text_that_a_schema_binds_goes_on_only_with_itself(size: int) -> None:
    whole = '{"a": 3, "b": 4}'
    seam = Seam(whole[:5], anew=True)
    parts = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert "".join(seam.take(part) for part in parts) == whole[5:]
    assert seam.rest_of(whole) == ""
    with pytest.raises(Exception, match="another answer"):
        Seam(whole[:5], anew=True).take('{"b": 4}')
    begins_elsewhere = Seam(whole[:5])
    assert begins_elsewhere.take('3, "b": 4}') == '3, "b": 4}'
