"""The market as an engine: what its readers get when sellers stop, lie, or begin again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import Agent, BudgetExhausted, Job, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import BoughtChunk, MarketCompute
from coase.agents.compute.ports import Message, ModelInfo, Prompt, PromptRefused
from coase.agents.inference import Stock, inference_agent
from coase.agents.seller import Windows
from coase.agents.wares import Completion, Inference
from coase.protocol.errors import ComputeFailed
from tests.agents.market import Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

# Nobody's silence on the chain is waited for, and a slow machine must not make any.
PATIENT = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
Work = Callable[[Inference, Job], Awaitable[Completion]]
WORDS = " ".join(f"word{number}" for number in range(60))
HEAD = " ".join(f"word{number}" for number in range(20))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


def honest(name: str = "honest", price: str = "0.02") -> Agent:
    return inference_agent(
        name, price=Price.per_task(price), compute=EchoCompute(), strategy="fixed", windows=PATIENT
    )


def seller_of(does: Work, name: str = "faulty", gate: Gate | None = None) -> Agent:
    seller = Agent(name)

    @seller.offers("inference", price=Price.per_task("0.01"), windows=PATIENT)
    async def work(task: Inference, job: Job) -> Completion:
        if gate is not None:
            gate.begun.set()
            await gate.open.wait()
        return await does(task, job)

    return seller


@dataclass
class Gate:
    """Holds a seller's work until the next seller is there: whoever is alone is asked first."""

    begun: anyio.Event = field(default_factory=anyio.Event)
    open: anyio.Event = field(default_factory=anyio.Event)


async def read_with_two(
    place: Market, compute: MarketCompute, does: Work, second: Agent
) -> tuple[Agent, list[BoughtChunk]]:
    """Read WORDS from a seller that does ``does``, and from ``second`` after it."""
    gate, chunks = Gate(), list[BoughtChunk]()
    first = seller_of(does, gate=gate)
    await place.join(first)

    async def reading() -> None:
        chunks.extend(await read(compute, Prompt.ask(WORDS, max_tokens=400)))

    async with anyio.create_task_group() as group:
        group.start_soon(reading)
        await gate.begun.wait()
        await place.join(second)
        gate.open.set()
    return first, chunks


def completion(text: str) -> Completion:
    return Completion(text=text, model="", input_tokens=1, output_tokens=1)


async def breaks(task: Inference, job: Job) -> Completion:
    job.show(HEAD, tokens=20)
    raise ValueError("no more ideas")


async def lies(task: Inference, job: Job) -> Completion:
    job.show(HEAD, tokens=20)
    return completion("something else altogether")


async def lies_at_the_end(task: Inference, job: Job) -> Completion:
    job.show(task.prompt, tokens=60)
    return completion("something else altogether")


async def stalls(task: Inference, job: Job) -> Completion:
    job.show(HEAD, tokens=20)
    await anyio.sleep_forever()
    raise AssertionError


async def floods(task: Inference, job: Job) -> Completion:
    job.show(HEAD, tokens=20)
    for _ in range(100):
        job.show("x" * 4_000, tokens=20)
    await anyio.sleep_forever()
    raise AssertionError


async def read(compute: MarketCompute, prompt: Prompt) -> list[BoughtChunk]:
    async with aclosing(compute.stream(prompt)) as stream:
        chunks = [chunk async for chunk in stream]
    bought = [chunk for chunk in chunks if isinstance(chunk, BoughtChunk)]
    assert bought == chunks
    return bought


def text_of(chunks: list[BoughtChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize(("fault", "paid"), [(breaks, 0), (lies, 10_000), (stalls, None)])
async def test_another_seller_goes_on_where_the_first_one_stopped(
    place: Market, fault: Work, paid: int | None
) -> None:
    second, buyer = honest(), Agent("buyer", budget="0.1")
    await place.join(buyer)
    compute = MarketCompute(buyer, max_price="0.05", stall_max_s=1)
    first, chunks = await read_with_two(place, compute, fault, second)
    assert chunks[0].text == HEAD
    assert text_of(chunks) == WORDS
    assert [deal.seller for deal in chunks[-1].bought] == [first.address, second.address]
    assert [deal.paid_units for deal in chunks[-1].bought] == [paid, 20_000]
    usage = chunks[-1].usage
    assert usage is not None
    assert sum(chunk.tokens for chunk in chunks) == usage.output_tokens
    if fault is not stalls:  # Whose price comes back when its time is up.
        await place.rest()
        assert place.earned(first) == (paid or 0)
        assert place.earned(buyer) == -20_000 - (paid or 0)


async def test_what_is_whole_when_its_seller_lies_is_whole_and_nobody_else_is_blamed(
    place: Market,
) -> None:
    buyer, second = Agent("buyer"), honest()
    await place.join(buyer)
    compute = MarketCompute(buyer, max_price="0.05")
    _, chunks = await read_with_two(place, compute, lies_at_the_end, second)
    assert text_of(chunks) == WORDS
    assert chunks[-1].done
    await place.rest()
    assert place.earned(second) == 20_000
    assert compute.book.cools_until_ms(second.address) == 0


async def test_a_seller_that_floods_is_left(place: Market) -> None:
    second, buyer = honest(), Agent("buyer")
    await place.join(buyer)
    compute = MarketCompute(buyer, max_price="0.05", stall_max_s=60)
    _, chunks = await read_with_two(place, compute, floods, second)
    assert len(text_of(chunks)) < 400 * 200
    assert len(chunks[-1].bought) in (1, 2)


async def test_a_seller_that_begins_again_is_joined_without_a_repetition(place: Market) -> None:
    async def begins_again(task: Inference, job: Job) -> Completion:
        assert task.begun == HEAD
        for word in WORDS.split():
            job.show(word + " ", tokens=9)
        return completion(WORDS + " ")

    second, buyer = seller_of(begins_again, "second"), Agent("buyer")
    await place.join(buyer)
    compute = MarketCompute(buyer, max_price="0.05")
    _, chunks = await read_with_two(place, compute, breaks, second)
    assert text_of(chunks) == WORDS + " "


async def test_where_everybody_fails_it_says_so_and_nothing_is_lost(place: Market) -> None:
    first, buyer = seller_of(breaks), Agent("buyer")
    await place.join(first, buyer)
    compute = MarketCompute(buyer, max_price="0.05", reply_within_ms=1_000)
    with pytest.raises(ComputeFailed, match="could not be bought"):
        await read(compute, Prompt.ask(WORDS))
    await place.rest()
    assert place.earned(buyer) == 0


async def test_a_prompt_never_costs_more_than_its_highest_price_over_all_its_sellers(
    place: Market,
) -> None:
    first, second, buyer = seller_of(lies), honest(), Agent("buyer")
    await place.join(first, second, buyer)
    compute = MarketCompute(buyer, max_price="0.025", reply_within_ms=1_000)
    with contextlib.suppress(ComputeFailed):  # Unless the honest one was quicker to offer.
        await read(compute, Prompt.ask(WORDS))
    await place.rest()
    assert place.earned(buyer) in (-10_000, -20_000)


async def test_the_budget_ends_it(place: Market) -> None:
    seller, buyer = honest(), Agent("buyer", budget="0.045")
    await place.join(seller, buyer)
    compute = MarketCompute(buyer, max_price="0.03")
    await read(compute, Prompt.ask("one two"))
    await place.rest()
    await read(compute, Prompt.ask("one two"))
    await place.rest()
    with pytest.raises(BudgetExhausted):
        await read(compute, Prompt.ask("one two"))
    assert place.earned(buyer) == -40_000


async def test_many_at_once_never_overspend_one_budget(place: Market) -> None:
    seller, buyer = honest(), Agent("buyer", budget="0.07")
    seller.offerings = {
        name: dataclasses.replace(offering, capacity=64)
        for name, offering in seller.offerings.items()
    }
    await place.join(seller, buyer)
    compute = MarketCompute(buyer, max_price="0.03")
    ends: list[str] = []

    async def call() -> None:
        try:
            ends.append(text_of(await read(compute, Prompt.ask("one two"))))
        except BudgetExhausted:
            ends.append("402")

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(call)
    await place.rest()
    answered = ends.count("one two")
    assert answered + ends.count("402") == 12
    assert 1 <= answered <= 3
    assert place.earned(buyer) == -20_000 * answered


async def test_closed_before_there_is_a_deal_it_buys_nothing(place: Market) -> None:
    seller, buyer = honest(), Agent("buyer")
    await place.join(seller, buyer)
    assert buyer.buying is not None
    reading = anyio.Event()

    async def leave_early() -> None:
        with anyio.CancelScope() as scope:
            place.node.runtime.observers.append(
                lambda _, notice: scope.cancel() if notice.kind == "asked" else None
            )
            reading.set()
            await read(MarketCompute(buyer, max_price="0.05"), Prompt.ask(WORDS))

    await leave_early()
    assert [ask.state for ask in buyer.buying.asks.values()] == ["ended"]
    assert place.earned(buyer) == 0


async def test_what_is_asked_of_a_conversation_reaches_the_seller(place: Market) -> None:
    tasks: list[Inference] = []

    async def note(task: Inference, job: Job) -> Completion:
        tasks.append(task)
        return completion("yes")

    seller, buyer = seller_of(note), Agent("buyer")
    await place.join(seller, buyer)
    messages = ("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Well?")
    prompt = Prompt(
        messages=tuple(Message(role, content) for role, content in messages),  # type: ignore[arg-type]
        stop=("\n",),
        temperature=0.7,
        seed=5,
        max_tokens=9,
    )
    await read(MarketCompute(buyer, max_price="0.05"), prompt)
    (task,) = tasks
    assert (task.system, task.prompt, task.stop) == ("Be short.", "Well?", ("\n",))
    assert [(turn.role, turn.content) for turn in task.history] == list(messages[1:3])
    assert (task.temperature_permille, task.seed, task.max_tokens) == (700, 5, 9)


async def test_models_are_those_that_sellers_name_and_no_other_is_offered(place: Market) -> None:
    stock, slow = Stock([ModelInfo(name="echo")]), Stock([ModelInfo(name="big")], token_us=10**6)
    sellers = [
        inference_agent(
            name, price=Price.per_task("0.01"), compute=EchoCompute(), stock=has, windows=PATIENT
        )
        for name, has in (("quick", stock), ("slow", slow))
    ]
    buyer = Agent("buyer")
    await place.join(*sellers, buyer)
    compute = MarketCompute(buyer, max_price="0.05")
    assert [info.name for info in await compute.models()] == ["big", "echo"]
    chunks = await read(compute, Prompt.ask("one two", model="echo"))
    assert [(b.model, b.seller) for b in chunks[-1].bought] == [("echo", sellers[0].address)]
    compute = MarketCompute(buyer, max_price="0.05", reply_within_ms=500)
    with pytest.raises(ComputeFailed, match="'big' could not be bought"):
        await read(compute, Prompt.ask("one two", model="big", max_tokens=256))


@pytest.mark.parametrize(
    "prompt",
    [Prompt.ask("x", logprobs=True), Prompt(messages=(Message("system", "only"),))],
    ids=["logprobs", "no question"],
)
async def test_what_the_ware_has_no_words_for_is_refused(place: Market, prompt: Prompt) -> None:
    buyer = Agent("buyer")
    await place.join(buyer)
    with pytest.raises(PromptRefused):
        await read(MarketCompute(buyer, max_price="0.05"), prompt)
