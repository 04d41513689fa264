"""Offers that would leave the buyer without defence are turned away, however cheap they are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents import Agent, DealFailed, Job, Price, Windows
from coase.agents.bargain import SellerBargain
from coase.agents.checks import fault_in_time
from coase.agents.fairness import QUARREL_MAX_S
from coase.agents.wares import Summarise, Summary
from tests.agents.market import SHORT, Market, market

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
        replace(SHORT, answer_s=QUARREL_MAX_S),
        replace(SHORT, bond_permille=900),
    ],
)
async def test_windows_that_defend_nobody_make_no_deal(place: Market, windows: Windows) -> None:
    await robbed(place, robber(windows))


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
    monkeypatch.setattr("coase.agents.checks.CHECK_MAX_S", 3.0)
    schema = '{"type": "string", "pattern": "^(a+)+$"}'
    assert await fault_in_time('"' + "a" * 60 + '!"', schema)


async def test_a_check_in_a_process_of_its_own_says_the_same() -> None:
    schema = '{"type": "object", "required": ["n"]}'
    assert await fault_in_time('{"n": 1}', schema) == ""
    assert "does not fit" in await fault_in_time("{}", schema)
