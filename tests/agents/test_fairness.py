"""Offers that would leave the buyer without defence are turned away, however cheap they are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents import Agent, DealFailed, Job, Price, Windows
from coase.agents.bargain import SellerBargain
from coase.agents.checks import ENDLESS, fault_in_time
from coase.agents.fairness import QUARREL_MAX_S, unfair
from coase.agents.wares import Completion, Inference, Summarise, Summary
from coase.protocol.errors import ConfigurationError
from coase.protocol.session import Margins
from tests.agents.market import SHORT, Market, market
from tests.protocol.threads import NOW_MS, NOW_S, REQUEST, TERMS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.seller import Quote

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90)]
TASK = Summarise(text="A text to be paid for.")


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


def robber(windows: Windows) -> Agent:
    agent = Agent("robber", by_rounds=True)

    @agent.offers("summarise", price=Price.per_task("0.02"), deliver_within=4, windows=windows)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return Summary.model_construct(summary="")

    return agent


async def robbed(place: Market, seller: Agent, **seat: Any) -> None:
    buyer = Agent("buyer")
    await place.join(seller, buyer)
    for name, value in seat.items():
        setattr(seller.selling, name, value)
    with pytest.raises(DealFailed):
        await buyer.hire(
            "summarise", TASK, returns=Summary, max_price="0.05", reply_within_ms=1_500
        )
    await place.rest()
    assert place.earned(buyer) == 0
    assert place.earned(seller) == 0


@pytest.mark.parametrize(
    "windows",
    [
        replace(SHORT, dispute_s=1),
        replace(SHORT, rule_s=1),
        replace(SHORT, lock_s=1),
        replace(SHORT, answer_s=QUARREL_MAX_S),
        replace(SHORT, bond_permille=900),
    ],
)
async def test_windows_that_defend_nobody_make_no_deal(place: Market, windows: Windows) -> None:
    await robbed(place, robber(windows))


async def test_who_is_paid_by_its_own_count_is_paid_what_there_can_be(place: Market) -> None:
    liar, buyer = Agent("liar"), Agent("buyer")
    price = Price.per_million(input="2000", output="8000")

    @liar.offers("inference", price=price, deliver_within=4, windows=SHORT)
    async def write(task: Inference, job: Job) -> Completion:
        job.meter(input_tokens=10**9, output_tokens=10**9)
        return Completion(text="no", model="m", input_tokens=10**9, output_tokens=10**9)

    await place.join(liar, buyer)
    with pytest.raises(DealFailed, match="costs more than the tokens"):
        await buyer.hire(
            "inference",
            Inference(prompt="hello"),
            returns=Completion,
            max_price="9",
            input_max=100,
            output_max=1_000,
        )
    await place.rest()
    # The arbiter believes no more tokens than the answer has bytes; a bond is a tenth at most.
    assert 0 < place.earned(liar) < -place.earned(buyer) < 3_000_000


async def test_offers_that_are_too_dear_keep_nobody_out(place: Market) -> None:
    buyer, honest = Agent("buyer", by_rounds=True), Agent("honest", by_rounds=True)
    dear = [Agent(f"dear-{number}", by_rounds=True) for number in range(4)]
    for agent in dear:

        @agent.offers("summarise", price=Price.per_task("9"), deliver_within=4, windows=SHORT)
        async def never(task: Summarise, job: Job) -> Summary:
            return Summary(summary="dear")

    @honest.offers("summarise", price=Price.per_task("0.02"), deliver_within=4, windows=SHORT)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return Summary(summary="good")

    await place.join(*dear, honest, buyer)  # They answer in this order.
    bought = await buyer.hire(
        "summarise", TASK, returns=Summary, max_price="0.05", bids_min=4, bids_max=4
    )
    assert bought.summary == "good"


async def test_numbers_of_offers_that_cannot_be_are_refused_at_once(place: Market) -> None:
    buyer = Agent("buyer")
    await place.join(buyer)
    for least, most in ((5, 4), (0, 4), (1, 257)):
        with pytest.raises(ConfigurationError, match="bids_min"):
            await buyer.hire(
                "summarise",
                TASK,
                returns=Summary,
                max_price="0.05",
                bids_min=least,
                bids_max=most,
            )


def test_windows_outlast_what_a_restart_takes() -> None:
    margins = Margins()
    terms = replace(TERMS, lock_by_s=NOW_S + 30, deliver_by_s=NOW_S + 90)
    fair = replace(terms, dispute_s=60, answer_s=60, rule_s=60)
    request = REQUEST.model_copy(update={"input_max": 0, "output_max": 0})
    assert unfair(fair, request, margins, now_ms=NOW_MS) == ""
    short = replace(fair, dispute_s=margins.halt_s)
    assert "dispute" in unfair(short, request, margins, now_ms=NOW_MS)
    short = replace(fair, rule_s=margins.halt_s)
    assert "arbiter" in unfair(short, request, margins, now_ms=NOW_MS)
    assert "lock" in unfair(fair, request, margins, now_ms=NOW_MS + 28_000)


async def test_a_seller_that_names_no_arbiter_makes_no_deal(place: Market) -> None:
    await robbed(place, robber(SHORT), arbiters=())


async def test_a_seller_that_wants_no_check_makes_no_deal(place: Market) -> None:
    class Unchecked(SellerBargain):
        def quote(self, *arguments: Any, **named: Any) -> Quote | None:
            quote = super().quote(*arguments, **named)
            return replace(quote, verification="none") if quote is not None else None

    seller = robber(SHORT)
    seller.bargain_class = Unchecked
    await robbed(place, seller)


async def test_a_pattern_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coase.agents.checks.CHECK_MAX_S", 1)
    schema = '{"type": "string", "pattern": "^(a+)+$"}'
    assert await fault_in_time('"' + "a" * 60 + '!"', schema) == ENDLESS


async def test_a_check_in_a_process_of_its_own_says_the_same() -> None:
    schema = '{"type": "object", "required": ["n"]}'
    assert await fault_in_time('{"n": 1}', schema) == ""
    assert "does not fit" in await fault_in_time("{}", schema)
