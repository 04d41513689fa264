"""Prompts that are called for under agreed rates, by real nodes over a network in memory."""

from __future__ import annotations

import contextlib
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent, Job, Price
from coase.agents.charges import charging
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import BoughtChunk, MarketCompute, Pick
from coase.agents.compute.ports import Prompt
from coase.agents.inference import inference_agent
from coase.agents.purse import Budget
from coase.agents.seller import Windows
from coase.agents.snapshot import read_snapshot
from coase.agents.steps import Notice, Step
from coase.agents.wares import Completion, Inference
from coase.protocol.errors import BudgetExhausted, DealFailed, Refused
from coase.protocol.session import Charge
from coase.protocol.types import units_to_text
from tests.agents.market import Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PATIENT = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
WORDS = " ".join(f"word{number}" for number in range(60))
RATE = Price.per_million(input="2", output="8")


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path, channels=True) as running:
        yield running


def seller_of(name: str) -> Agent:
    return inference_agent(
        name, price=RATE, compute=EchoCompute(), strategy="fixed", windows=PATIENT
    )


class Watched:
    """A buyer, its engine, and what was asked and called for."""

    def __init__(self, place: Market, *sellers: Agent) -> None:
        self.place, self.sellers = place, sellers
        self.buyer = Agent("buyer", budget="5")
        self.compute = MarketCompute(self.buyer, max_price="0.01", stall_max_s=2)
        self.asked = 0
        self.called = 0

    async def join(self) -> None:
        await self.place.join(*self.sellers, self.buyer)
        self.place.node.runtime.observers.append(self._observe)

    def _observe(self, agent: str, notice: Notice) -> None:
        if agent == self.buyer.address:
            self.asked += notice.kind == "asked"
            self.called += notice.kind == "said:call"

    async def read(self, text: str = WORDS) -> list[BoughtChunk]:
        """Read an answer of the first seller, or of whoever is left."""
        pick = Pick(asked=(self.sellers[0].address,))
        chunks = list[BoughtChunk]()
        call = self.compute.call(Prompt.ask(text, max_tokens=400), pick)
        async with aclosing(call.stream()) as stream:
            async for chunk in stream:
                assert isinstance(chunk, BoughtChunk)
                chunks.append(chunk)
        return chunks

    async def agreed(self, count: int = 1) -> None:
        """Return once the rates that were asked for are agreed, so many in all."""
        assert self.buyer.seat is not None
        await self.compute.rates.ready()
        assert len(self.buyer.seat.desk.contracts(self.sellers[0].address)) == count


def text_of(chunks: list[BoughtChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def test_the_second_prompt_is_called_for_and_paid_like_the_first(
    place: Market, tmp_path: Path
) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    first = await watched.read()
    await watched.agreed()
    assert (watched.asked, watched.called) == (2, 0)  # The prompt, and rates.
    await place.rest()
    kept = read_snapshot(tmp_path / "journal.sqlite", deep=True)
    assert kept.faults == []
    assert [thread.is_contract for thread in kept.threads] == [True, True]  # Of either side.
    assert kept.bound() == []
    second = await watched.read()
    assert (watched.asked, watched.called) == (2, 1)
    assert text_of(first) == text_of(second)
    paid = [chunks[-1].bought[-1].paid_units for chunks in (first, second)]
    assert paid[0] == paid[1]
    assert first[-1].bought[-1].deal != second[-1].bought[-1].deal
    await place.rest()
    assert watched.buyer.purse.balance.spent_units == sum(units or 0 for units in paid)
    await watched.compute.close()
    kept = read_snapshot(tmp_path / "journal.sqlite", deep=True)
    assert kept.faults == []
    assert all(one.again == one.data for one in kept.closed)
    assert sum("contract" in one.row for one in kept.closed) == 2


async def test_many_at_once_are_called_for_under_the_same_rates(place: Market) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    first = await watched.read()
    await watched.agreed()
    answers: list[str] = []

    async def reading() -> None:
        answers.append(text_of(await watched.read()))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(reading)
    assert answers == [text_of(first)] * 4
    assert watched.called == 4
    await place.rest()
    await watched.compute.close()


async def test_what_many_call_for_at_once_never_overspends_an_account(place: Market) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    first = await watched.read()
    await watched.agreed()
    bought = first[-1].bought[-1]
    assert bought.paid_units
    limit_units = 3 * bought.price_units
    asset = place.node.settlement.asset
    limit = Budget(total=units_to_text(limit_units, asset.decimals))
    watched.buyer.purse.set_account("alice", limit)
    answered: list[int] = []

    async def reading() -> None:
        with charging(Charge("alice")), contextlib.suppress(BudgetExhausted):
            chunks = await watched.read()
            answered.append(chunks[-1].bought[-1].paid_units or 0)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(reading)
    assert 0 < len(answered) < 20
    await place.rest()
    assert watched.buyer.purse.used_by("alice") == sum(answered) <= limit_units
    await watched.compute.close()


@pytest.mark.parametrize(
    "limits",
    [{"input_max": 1_000, "output_max": 1}, {"input_max": 3, "output_max": 400}],
)
async def test_no_seller_writes_or_reads_more_than_is_paid_for(
    place: Market, limits: dict[str, int]
) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    await watched.read()
    await watched.agreed()
    buyer, before = watched.buyer, watched.buyer.purse.balance.spent_units
    assert buyer.seat is not None
    task, shown = Inference(prompt=WORDS, max_tokens=400), list[str]()
    wish: dict[str, Any] = {"returns": Completion, "on_text": shown.append, **limits}
    with pytest.raises(DealFailed, match="were agreed"):
        await buyer.purchase("inference", task, max_price="0.01", settlements=("channel",), **wish)
    (contract,) = buyer.seat.desk.contracts(watched.sellers[0].address)
    with pytest.raises(DealFailed, match=r"were agreed|wrong_terms"):
        await buyer.call(contract, task, **wish)
    await place.rest()
    assert shown == []
    assert buyer.purse.balance.spent_units == before
    await watched.compute.close()


async def test_what_was_paid_to_one_that_broke_off_is_told_with_the_rest(place: Market) -> None:
    breaking = Agent("breaking")

    @breaking.offers("inference", price=RATE, windows=PATIENT, shown=True)
    async def work(task: Inference, job: Job) -> Completion:
        job.show(WORDS[: len(WORDS) // 2], tokens=30)
        await job.drain()
        raise ValueError("no more ideas")

    watched = Watched(place, breaking, seller_of("other"))
    await watched.join()
    chunks = await watched.read()
    assert text_of(chunks) == WORDS
    paid = [deal.paid_units for deal in chunks[-1].bought]
    assert len(paid) == 2
    assert paid[0]
    await place.rest()
    assert watched.buyer.purse.balance.spent_units == sum(units or 0 for units in paid)
    await watched.compute.close()


async def test_who_ends_its_work_withdraws_its_rates(place: Market) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    await watched.read()
    await watched.agreed()
    assert watched.buyer.seat is not None
    await place.node.runtime.say_goodbye()
    assert not watched.buyer.seat.desk.contracts()
    kinds = [letter.kind for letter in watched.buyer.seat.desk.dead]
    assert "call" not in kinds
    await watched.compute.close()


async def test_who_names_no_size_is_told_that_tokens_are_sold_by_it(place: Market) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    with pytest.raises(DealFailed, match="needs input_max and output_max"):
        await watched.buyer.purchase(
            "inference",
            Inference(prompt="hello"),
            returns=Completion,
            max_price="0.01",
            reply_within_ms=500,
        )
    await watched.compute.close()


async def test_a_larger_prompt_is_asked_for_and_has_the_rates_widened(place: Market) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    await watched.read()
    await watched.agreed()
    large = WORDS * 8
    await watched.read(large)
    assert watched.called == 0
    await watched.agreed(2)
    await watched.read(large)
    assert watched.called == 1
    await watched.compute.close()


async def test_a_call_that_is_refused_is_bought_as_usual(
    place: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(place, seller_of("seller"))
    await watched.join()
    first = await watched.read()
    await watched.agreed()

    def full(*_: object, **__: object) -> None:
        raise Refused("capacity", "no place is free")

    monkeypatch.setattr("coase.agents.seller.SellerDesk.called", full)
    second = await watched.read()
    assert text_of(second) == text_of(first)
    assert watched.called == 1
    assert [deal.seller for deal in second[-1].bought] == [watched.sellers[0].address]
    await place.rest()
    spent = sum(chunks[-1].bought[-1].paid_units or 0 for chunks in (first, second))
    assert watched.buyer.purse.balance.spent_units == spent
    await watched.compute.close()


async def test_a_seller_that_does_not_take_the_task_is_left_behind(
    place: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(place, seller_of("silent"), seller_of("other"))
    await watched.join()
    first = await watched.read()
    await watched.agreed()

    assert watched.sellers[0].seat is not None
    desk = watched.sellers[0].seat.desk
    hear = desk.hear

    def deaf(wire: bytes, *, now_ms: int) -> Step:
        return Step() if b'"kind":"call"' in wire else hear(wire, now_ms=now_ms)

    monkeypatch.setattr(desk, "hear", deaf)
    second = await watched.read()
    assert text_of(second) == text_of(first)
    assert second[-1].bought[-1].seller == watched.sellers[1].address
    await place.rest()
    await watched.compute.close()
