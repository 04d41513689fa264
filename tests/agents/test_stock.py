"""What a seller of inference promises by: its models, how fast they are, and what to load first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.ports import ModelInfo, Usage
from coase.agents.inference import InferenceBargain, Stock
from coase.negotiation.pricing import Markup, Price
from coase.protocol.errors import ComputeFailed
from tests.agents.desks import ASSET
from tests.agents.desks import Market as Desks

if TYPE_CHECKING:
    from coase.agents.seller import Quote
    from coase.protocol.messages import Request

GB = 10**9
SMALL = ModelInfo(name="small", loaded=True, size_bytes=GB, context_tokens=1_000)
LARGE = ModelInfo(name="large", loaded=False, size_bytes=8 * GB)
PRICE = Price.per_million(
    input="2",
    output="8",
    markup=Markup(load_permille=400, job_permille=100, cold_permille=200),
)


@pytest.fixture
def asked() -> Request:
    desks = Desks()
    ask = desks.ask()
    wanted: dict[str, Any] = {
        "input_max": 200,
        "output_max": 100,
        "deliver_within_s": 60,
        "model": "small",
    }
    return ask.request.model_copy(update=wanted)


def quoted(stock: Stock, request: Request, *, load: int = 0) -> Quote | None:
    bargain = InferenceBargain(stock, PRICE, ASSET, deliver_within_s=60, capacity=8)
    return bargain.quote(request, "0xb0", load=load, now_ms=0)


def test_a_model_that_must_be_loaded_first_is_dearer_and_slower(asked: Request) -> None:
    stock = Stock([SMALL, LARGE], token_us=10_000)
    small, large = quoted(stock, asked), quoted(stock, asked.model_copy(update={"model": "large"}))
    assert small is not None
    assert large is not None
    assert large.price_units == small.price_units * 12 // 10
    # Eight gigabytes are read in 16 s, and each token takes eight times as long.
    spent_ms = stock.expected_ms(input_tokens=0, output_tokens=100, load=0, model="large")
    assert spent_ms == 16_000 + 100 * 80
    hurry = asked.model_copy(update={"deliver_within_s": 20})
    assert quoted(stock, hurry) is not None
    assert quoted(stock, hurry.model_copy(update={"model": "large"})) is None


def test_what_was_seen_takes_the_place_of_what_was_guessed() -> None:
    stock = Stock([SMALL, LARGE], token_us=10_000)
    usage = Usage(input_tokens=0, output_tokens=100, duration_ms=3_000)
    stock.learn(usage, model="large", elapsed_ms=5_000)
    assert (stock.pace_us("large"), stock.token_us, stock.loads_ms("large")) == (30_000, 10_000, 0)
    stock.models = [SMALL, LARGE]
    assert stock.loads_ms("large") == 2_000
    stock.learn(replace(usage, duration_ms=1_000))
    assert stock.token_us == stock.pace_us("small") == stock.pace_us() == 10_000


def test_load_and_queue_make_it_dearer_and_at_last_too_late(asked: Request) -> None:
    stock = Stock([SMALL], token_us=100_000, concurrency=2)
    prices = [quote.price_units for load in range(4) if (quote := quoted(stock, asked, load=load))]
    idle = prices[0]
    assert prices == [idle, idle * 12 // 10, idle * 14 // 10, idle * 15 // 10]
    late = asked.model_copy(update={"deliver_within_s": 20})
    assert quoted(stock, late, load=1) is not None
    assert quoted(stock, late, load=2) is None, "two turns take over twenty seconds"


def test_what_no_context_holds_is_not_offered(asked: Request) -> None:
    stock = Stock([SMALL, LARGE])
    long = asked.model_copy(update={"input_max": 2_000})
    assert quoted(stock, long) is None
    assert quoted(stock, long.model_copy(update={"model": "large"})) is not None


class Away(EchoCompute):
    """An engine that can go away."""

    gone = False

    async def models(self) -> list[ModelInfo]:
        if self.gone:
            raise ComputeFailed("nobody answers")
        return [SMALL, LARGE]


@pytest.mark.anyio
async def test_nothing_is_offered_while_the_engine_is_away(asked: Request) -> None:
    engine, stock = Away(), Stock()
    assert await stock.refresh(engine)
    assert not await stock.refresh(engine)
    assert quoted(stock, asked) is not None
    engine.gone = True
    assert not await stock.refresh(engine)
    assert stock.away == "nobody answers"
    assert quoted(stock, asked) is None
    engine.gone = False
    assert not await stock.refresh(engine)
    assert quoted(stock, asked) is not None
