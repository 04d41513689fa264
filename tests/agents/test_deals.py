"""Deals told from both ends, over the public face: what is bought, paid, refused and refunded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from pydantic import BaseModel

from coase.agents import Agent, Job, Price
from coase.agents.means import OpenMeans
from coase.agents.wares import Summarise, Summary
from coase.protocol.errors import ConfigurationError, DealFailed
from tests.agents.market import SHORT, Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90)]
TASK = Summarise(text="A lighthouse sells what cannot be sold.")


class Words(BaseModel):
    """Output of a counting capability."""

    words: int


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


def scribe(
    name: str, work: Callable[[Summarise, Job], Awaitable[object]], price: str = "0.02"
) -> Agent:
    agent = Agent(name, by_rounds=True)

    @agent.offers("summarise", price=Price.per_task(price), deliver_within=4, windows=SHORT)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return await work(task, job)  # type: ignore[return-value]

    return agent


async def honest(task: Summarise, job: Job) -> Summary:
    return Summary(summary=task.text[:10])


async def test_a_deal_pays_the_seller_what_was_agreed(place: Market) -> None:
    seller, buyer = scribe("seller", honest), Agent("buyer")
    await place.join(seller, buyer)
    bought = await buyer.purchase("summarise", TASK, returns=Summary, max_price="0.05")
    assert bought.result.summary == "A lighthou"
    assert bought.seller == seller.address
    await place.rest()
    assert place.earned(seller) == bought.paid_units == 20_000
    assert place.earned(buyer) == -20_000
    assert place.chain.held() == 0


async def test_what_fails_its_schema_is_disputed_and_the_money_comes_back(place: Market) -> None:
    async def nonsense(task: Summarise, job: Job) -> Summary:
        return Summary.model_construct(summary="")

    seller, buyer = scribe("liar", nonsense), Agent("buyer")
    await place.join(seller, buyer)
    with pytest.raises(DealFailed, match="does not fit its schema"):
        await buyer.hire("summarise", TASK, returns=Summary, max_price="0.05")
    await place.rest()
    assert place.earned(buyer) == 0
    # The liar paid the arbiter with its bond, a tenth of the price.
    assert place.earned(seller) == -2_000
    assert place.chain.balance(place.arbiter.identity.address) == 2_000
    assert [finding.to_seller_units for _, finding in place.arbiter.rulings] == [0]


async def test_a_false_dispute_costs_the_buyer_and_the_seller_is_paid(place: Market) -> None:
    seller, buyer = scribe("seller", honest), Agent("quarreller")
    await place.join(seller, buyer)
    with pytest.raises(DealFailed, match="I do not like it"):
        await buyer.hire(
            "summarise",
            TASK,
            returns=Summary,
            max_price="0.05",
            check=lambda summary: "I do not like it",
        )
    await place.rest()
    assert place.earned(seller) == 20_000
    assert place.earned(buyer) == -22_000


async def test_who_never_delivers_is_not_paid_and_the_buyer_tries_another(place: Market) -> None:
    async def never(task: Summarise, job: Job) -> Summary:
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    sloth, seller = scribe("sloth", never, "0.01"), scribe("seller", honest)
    buyer = Agent("buyer")
    await place.join(sloth, seller, buyer)
    bought = await buyer.purchase("summarise", TASK, returns=Summary, max_price="0.05", tries=2)
    assert bought.seller == seller.address
    await place.rest()
    assert place.earned(sloth) == 0
    assert place.earned(buyer) == -20_000


async def test_a_handler_that_fails_declines_and_the_money_comes_back_at_once(
    place: Market,
) -> None:
    async def broken(task: Summarise, job: Job) -> Summary:
        raise RuntimeError("no paper left")

    seller, buyer = scribe("broken", broken), Agent("buyer")
    await place.join(seller, buyer)
    with pytest.raises(DealFailed, match="declined"):
        await buyer.hire("summarise", TASK, returns=Summary, max_price="0.05")
    await place.rest()
    assert place.earned(buyer) == place.earned(seller) == 0


@pytest.mark.parametrize("made", [{"words": 3}, "text", None, Words(words=3), {"summary": 7}])
async def test_a_handler_that_returns_something_else_declines_and_loses_nothing(
    place: Market, made: object
) -> None:
    async def careless(task: Summarise, job: Job) -> object:
        return made

    seller, buyer = scribe("careless", careless), Agent("buyer")
    await place.join(seller, buyer)
    with pytest.raises(DealFailed, match="declined"):
        await buyer.hire("summarise", TASK, returns=Summary, max_price="0.05")
    await place.rest()
    assert place.earned(buyer) == place.earned(seller) == 0


async def test_a_dict_that_fits_is_as_good_as_the_model(place: Market) -> None:
    async def terse(task: Summarise, job: Job) -> object:
        return {"summary": "short"}

    seller, buyer = scribe("terse", terse), Agent("buyer")
    await place.join(seller, buyer)
    bought = await buyer.purchase("summarise", TASK, returns=Summary, max_price="0.05")
    assert bought.result == Summary(summary="short")
    await place.rest()
    assert place.earned(seller) == 20_000


async def test_metered_work_costs_what_was_used_and_never_above_the_cap(place: Market) -> None:
    agent = Agent("meter", by_rounds=True)

    @agent.offers(
        "count",
        price=Price.per_million(input="2", output="8"),
        deliver_within=4,
        windows=SHORT,
    )
    async def count(task: Summarise, job: Job) -> Words:
        job.meter(input_tokens=100, output_tokens=10)
        return Words(words=len(task.text.split()))

    buyer = Agent("buyer")
    await place.join(agent, buyer)
    bought = await buyer.purchase(
        "count", TASK, returns=Words, max_price="0.01", input_max=200, output_max=50
    )
    assert (bought.price_units, bought.paid_units) == (2 * 200 + 8 * 50, 2 * 100 + 8 * 10)
    await place.rest()
    assert place.earned(agent) == 280


async def test_a_seller_buys_what_it_needs(place: Market) -> None:
    async def outsource(task: Summarise, job: Job) -> Summary:
        return await job.hire(
            "summarise", task, returns=Summary, max_price="0.01", deliver_within=4
        )

    inner, outer = scribe("inner", honest, "0.008"), scribe("outer", outsource)
    buyer = Agent("buyer")
    await place.join(inner, outer, buyer)
    bought = await buyer.purchase(
        "summarise", TASK, returns=Summary, max_price="0.05", blocked=[inner.address]
    )
    assert bought.seller == outer.address
    await place.rest()
    assert (place.earned(outer), place.earned(inner)) == (12_000, 8_000)


async def test_nobody_sells_it(place: Market) -> None:
    buyer = Agent("buyer")
    await place.join(buyer)
    with pytest.raises(DealFailed, match="nobody made an offer"):
        await buyer.hire("summarise", TASK, returns=Summary, max_price="0.05", reply_within_ms=300)


async def test_too_dear_is_refused_and_nothing_is_locked(place: Market) -> None:
    seller, buyer = scribe("seller", honest, "0.5"), Agent("buyer")
    await place.join(seller, buyer)
    with pytest.raises(DealFailed):
        await buyer.hire("summarise", TASK, returns=Summary, max_price="0.05")
    await place.rest()
    assert place.earned(buyer) == place.earned(seller) == 0


async def test_a_buyer_without_money_loses_nothing_and_the_seller_is_free_again(
    place: Market,
) -> None:
    seller, buyer = scribe("seller", honest), Agent("pauper")
    await place.join(seller)
    await place.join(buyer, units=0)
    assert buyer.buying is not None
    buyer.buying.means = OpenMeans()  # It promises what it does not have.
    with pytest.raises(DealFailed):
        await buyer.hire("summarise", TASK, returns=Summary, max_price="0.05")
    await place.rest()
    assert place.earned(seller) == 0
    assert seller.seat is not None
    assert seller.seat.desk.threads == {}


async def test_the_same_key_is_the_same_purchase(place: Market) -> None:
    seller, buyer = scribe("seller", honest), Agent("buyer")
    await place.join(seller, buyer)

    async def once() -> str:
        bought = await buyer.purchase(
            "summarise", TASK, returns=Summary, max_price="0.05", key="order 17"
        )
        return bought.deal

    assert await once() == await once()
    await place.rest()
    assert place.earned(seller) == 20_000


async def test_many_at_once_are_each_paid_once(place: Market) -> None:
    seller, buyer = scribe("seller", honest), Agent("buyer")
    seller.offerings = {
        key: offering for key, offering in seller.offerings.items() if offering.capacity
    }
    await place.join(seller, buyer)
    deals: set[str] = set()

    async def one(number: int) -> None:
        bought = await buyer.purchase(
            "summarise",
            Summarise(text=f"text number {number}"),
            returns=Summary,
            max_price="0.05",
            tries=4,
        )
        deals.add(bought.deal)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(one, number)
    await place.rest()
    assert len(deals) == 4
    assert place.earned(seller) == 4 * 20_000


@pytest.mark.parametrize("price", ["abc", "-1", "0", "0.0000001", "1e9", "", "9" * 40])
async def test_a_price_that_is_none_is_named_before_anything_is_sent(
    place: Market, price: str
) -> None:
    buyer = Agent("buyer")
    await place.join(buyer)
    with pytest.raises(ConfigurationError):
        await buyer.hire("summarise", TASK, returns=Summary, max_price=price)


def test_a_handler_without_models_is_told_what_to_write() -> None:
    agent = Agent("careless")
    with pytest.raises(ConfigurationError, match="pydantic model"):

        @agent.offers("summarise", price=Price.per_task("0.02"))
        async def summarise(task: str, job: Job) -> Summary:
            return Summary(summary=task)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "../up", "näme!"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="no name"):
        Agent(name)
