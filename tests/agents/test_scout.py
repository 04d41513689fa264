"""What is heard of sellers goes into the book, and what was seen of them decides who is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.agents import Agent, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import MarketCompute, Pick
from coase.agents.compute.ports import Prompt
from coase.agents.compute.router import RouterCompute, Unreachable
from coase.agents.compute.routing import Wish
from coase.agents.compute.scout import listed_rates
from coase.agents.compute.ways import Place
from coase.agents.inference import Stock, inference_agent, region_checked, region_of
from coase.protocol.errors import ComputeFailed, ConfigurationError
from tests.agents.market import ASSET, Market, market
from tests.agents.test_compute_market import PATIENT, breaks, honest, seller_of, text_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.compute.market import BoughtChunk

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
ASKED = Prompt.ask("one two three four")


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


async def read(compute: MarketCompute, pick: Pick) -> tuple[str, list[str]]:
    """Return what was written, and who was paid for it."""
    call = compute.call(ASKED, pick)
    chunks: list[BoughtChunk] = [chunk async for chunk in call.stream()]  # type: ignore[misc]
    return text_of(chunks), [deal.seller for deal in call.bought]


@pytest.mark.parametrize(
    ("price", "rates"),
    [
        (Price.per_task("0.02"), {"fixed_units": 20_000}),
        (Price.per_second("0.5"), {"second_units": 500_000}),
        (
            Price.per_million(input="1", output="4"),
            {"input_units": 1_000_000, "cached_units": 1_000_000, "output_units": 4_000_000},
        ),
        (
            Price.per_million(input="1", cached_input="0.1", output="4"),
            {"input_units": 1_000_000, "cached_units": 100_000, "output_units": 4_000_000},
        ),
    ],
)
def test_a_listed_price_is_read_as_it_is_written(price: Price, rates: dict[str, int]) -> None:
    assert listed_rates(str(price), ASSET) == rates


@pytest.mark.parametrize("text", ["", "free", "0.00000001 a task", "-1 a task", "1 in, 2 out"])
def test_what_is_no_price_is_none(text: str) -> None:
    assert listed_rates(text, ASSET) == {}


async def test_who_sells_what_for_how_much_is_known_before_anything_is_bought(
    place: Market,
) -> None:
    seller, buyer = honest(price="0.02"), Agent("buyer")
    await place.join(seller, buyer)
    compute = MarketCompute(buyer, max_price="0.05")
    await compute.models()
    (way,) = compute.book
    assert (way.listing.seller, way.listing.fixed_units) == (seller.address, 20_000)
    assert way.listing.place is Place.MARKET
    assert way.seen == 0
    await compute.close()


async def test_a_purchase_teaches_how_quick_and_how_far_its_seller_is(place: Market) -> None:
    seller, buyer = honest(), Agent("buyer")
    await place.join(seller, buyer)
    compute = MarketCompute(buyer, max_price="0.05")
    await compute.models()
    assert await read(compute, Pick()) == ("one two three four", [seller.address])
    (way,) = compute.book
    assert (way.seen, way.inside) == (1, 0)
    assert way.good > 0
    assert way.first_us > 0
    assert way.distance_us > 0
    await compute.close()


async def test_chosen_sellers_are_asked_alone_and_others_only_if_they_are_silent(
    place: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap, dear, buyer = honest("cheap", "0.01"), honest("dear", "0.04"), Agent("buyer")
    await place.join(cheap, dear, buyer)
    compute = MarketCompute(buyer, max_price="0.05")
    assert (await read(compute, Pick(asked=(dear.address,))))[1] == [dear.address]
    nobody = "0x" + "9" * 40
    monkeypatch.setattr("coase.agents.compute.purchase.ASKED_REPLY_MS", 300)
    silent = Pick(asked=(nobody,), allowed=frozenset({nobody, dear.address}))
    assert (await read(compute, silent))[1] == [dear.address]
    assert (await read(compute, Pick(banned=frozenset({cheap.address}))))[1] == [dear.address]
    await place.rest()
    assert place.earned(cheap) == 0


async def test_nobody_but_who_is_allowed_gets_the_prompt_even_if_that_fails(
    place: Market,
) -> None:
    stranger, faulty, buyer = honest("stranger", "0.001"), seller_of(breaks), Agent("buyer")
    await place.join(stranger, faulty, buyer)
    compute = MarketCompute(buyer, max_price="0.05", reply_within_ms=500)
    call = compute.call(ASKED, Pick(allowed=frozenset({faulty.address})))
    with pytest.raises(ComputeFailed, match="nobody is left to ask"):
        _ = [chunk async for chunk in call.stream()]
    assert [attempt.outcome for attempt in call.attempts] == ["failed"]
    await place.rest()
    assert place.earned(stranger) == place.earned(faulty) == place.earned(buyer) == 0
    assert compute.book.cools_until_ms(faulty.address) > 0


async def selling(name: str, price: str, region: str) -> Agent:
    stock = Stock(await EchoCompute().models(), region=region)
    return inference_agent(
        name,
        price=Price.per_task(price),
        compute=EchoCompute(),
        stock=stock,
        strategy="fixed",
        windows=PATIENT,
    )


async def test_what_is_to_stay_in_a_region_goes_to_nobody_elsewhere(place: Market) -> None:
    near = await selling("near", "0.04", "eu-west")
    far = await selling("far", "0.01", "us")
    nowhere = await selling("nowhere", "0.01", "")
    buyer = Agent("buyer")
    await place.join(near, far, nowhere, buyer)
    compute = MarketCompute(buyer, max_price="0.05")
    router = RouterCompute(market=compute, wish=Wish(regions=frozenset({"eu-west"})))
    for _ in range(2):
        assert (await router.complete(ASKED)).text == "one two three four"
    await place.rest()
    assert place.earned(near) == 80_000
    assert place.earned(far) == place.earned(nowhere) == 0
    await router.close()
    elsewhere = RouterCompute(market=compute, wish=Wish(regions=frozenset({"mars"})))
    with pytest.raises(Unreachable, match="another region"):
        await elsewhere.complete(ASKED)
    await elsewhere.close()


@pytest.mark.parametrize("text", ["EU", "a b", "-x", "x" * 33, "é"])
def test_what_is_no_region_is_refused_and_not_believed(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no region"):
        region_checked(text)
    assert region_of(f"completion region:{text}") in ("", "a")
