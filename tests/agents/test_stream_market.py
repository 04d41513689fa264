"""Prompts that a channel pays, on a real chain: one deposit, a voucher a chunk, one claim."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import Agent, Job, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import BoughtChunk, MarketCompute
from coase.agents.compute.ports import Prompt
from coase.agents.inference import inference_agent
from coase.agents.wares import Completion, Inference
from coase.protocol.errors import ComputeFailed

from .realmarket import LONG, real_market

if TYPE_CHECKING:
    from pathlib import Path

    from coase.agents.node import Node

pytestmark = pytest.mark.anyio
WORDS = " ".join(f"word{n}" for n in range(150))
PRICE = Price.per_million(input="2", output="20")


def seller(name: str = "writer", *, delay_s: float = 0.0) -> Agent:
    engine = EchoCompute(chunk_delay_s=delay_s)
    return inference_agent(name, price=PRICE, compute=engine, windows=LONG, strategy="fixed")


async def read(market: MarketCompute, prompt: Prompt) -> list[BoughtChunk]:
    async with aclosing(market.stream(prompt)) as stream:
        chunks = [chunk async for chunk in stream]
    assert all(isinstance(chunk, BoughtChunk) for chunk in chunks)
    return chunks  # type: ignore[return-value]


def vouchers(node: Node, agent: Agent) -> int:
    assert agent.seat is not None
    ends = [line.seller for line in agent.seat.desk.streams.lines.values()]
    return sum(end.secured_units for end in ends if end is not None)


async def test_answers_are_paid_by_the_chunk_and_claimed_together(tmp_path: Path) -> None:
    writer, reader = seller(delay_s=0.004), Agent("reader", budget="1")
    async with real_market(tmp_path) as place, place.node() as node:
        await place.join(node, writer, reader)
        assert node.channels is not None
        assert node.collector is not None
        had = await node.settlement.balance(writer.address)
        market = MarketCompute(reader, max_price="0.04")
        prompt = Prompt.ask(WORDS, max_tokens=400)
        first = await read(market, prompt)
        assert "".join(chunk.text for chunk in first).split() == WORDS.split()
        assert sum(1 for chunk in first if chunk.text) > 2
        await place.rest(node)
        blocks = [event.kind for event in (await node.channels.events(0))[0]]
        second = await read(market, prompt)
        await place.rest(node)
        assert [event.kind for event in (await node.channels.events(0))[0]] == blocks
        paid = sum((chunks[-1].bought[-1].paid_units or 0) for chunks in (first, second))
        assert 0 < paid == vouchers(node, writer) == reader.purse.balance.spent_units
        with anyio.fail_after(60):
            while await node.settlement.balance(writer.address) < had + paid:
                await node.collector.collect()
                await anyio.sleep(0.2)
        assert await node.settlement.balance(writer.address) == had + paid
        assert await node.channels.unpaid(writer.address) == 0


async def test_who_stops_reading_stops_paying(tmp_path: Path) -> None:
    writer, reader = seller(delay_s=0.02), Agent("reader", budget="1")
    async with real_market(tmp_path) as place, place.node() as node:
        await place.join(node, writer, reader)
        market = MarketCompute(reader, max_price="0.04")
        async with aclosing(market.stream(Prompt.ask(WORDS, max_tokens=400))) as stream:
            async for _ in stream:
                break
        await place.rest(node)
        whole = len(WORDS) // 4 * 20
        assert 0 < vouchers(node, writer) == reader.purse.balance.spent_units < whole // 2


async def test_an_answer_that_says_nothing_is_not_paid(tmp_path: Path) -> None:
    nobody, reader = Agent("nobody"), Agent("reader", budget="1")

    @nobody.offers("inference", price=PRICE, windows=LONG, shown=True)
    async def infer(task: Inference, job: Job) -> Completion:
        return Completion(text=" ", model="", input_tokens=9, output_tokens=9)

    async with real_market(tmp_path) as place, place.node() as node:
        await place.join(node, nobody, reader)
        market = MarketCompute(reader, max_price="0.04")
        with pytest.raises(ComputeFailed, match="could not be bought"):
            await read(market, Prompt.ask("hello", max_tokens=20))
        await place.rest(node)
        assert vouchers(node, nobody) == reader.purse.balance.spent_units == 0
