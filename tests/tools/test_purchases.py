"""A buyer's command stays as long as its absence could cost the price, and says until when."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import Agent, Job, Price
from coase.agents.seller import Windows
from coase.agents.wares import Summarise, Summary
from coase.protocol.errors import DealFailed
from coase.protocol.states import State
from coase.tools.cli import purchases
from tests.agents.market import MARGINS, Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.protocol.session import Thread

NEVER_MS = 10**12
# Only the time to deliver is waited for; nothing else may be late on a slow machine.
WINDOWS = Windows(lock_s=3, dispute_s=30, answer_s=30, rule_s=30)


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Market]:
    # Whatever else a command waits for must not be what makes it stay.
    monkeypatch.setattr(purchases, "REST_MAX_S", 0.0)
    async with market(tmp_path) as running:
        yield running


async def cheated(place: Market) -> tuple[Agent, str]:
    """Return a buyer that refused a result, and the deal: its seller keeps still to the last."""
    seller, buyer = Agent("cheat"), Agent("buyer")

    @seller.offers("summarise", price=Price.per_task("0.02"), deliver_within=3, windows=WINDOWS)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return Summary.model_construct(summary="")

    await place.join(seller, buyer)
    assert seller.seat is not None
    seller.seat.desk.margins = replace(MARGINS, settle_patience_ms=NEVER_MS)
    with pytest.raises(DealFailed) as raised:
        await buyer.purchase(
            "summarise",
            Summarise(text="one"),
            returns=Summary,
            max_price="0.05",
            decide_after_ms=100,
        )
    assert thread_of(buyer, raised.value.deal_id).state is State.LOCKED
    return buyer, raised.value.deal_id


def thread_of(buyer: Agent, deal: str) -> Thread:
    assert buyer.seat is not None
    return buyer.seat.desk.threads[deal]


@pytest.mark.anyio
async def test_it_stays_until_what_it_refused_is_disputed_and_the_arbiter_knows_why(
    place: Market, capsys: pytest.CaptureFixture[str]
) -> None:
    buyer, deal = await cheated(place)
    states: list[tuple[State, bool]] = []

    def watch(*_: object) -> None:
        desk = buyer.seat.desk if buyer.seat is not None else None
        if desk is not None and deal in desk.threads:
            states.append((desk.threads[deal].state, desk.was_shown(deal)))

    place.node.runtime.observers.append(watch)
    await purchases._rest(place.node, buyer)
    seen = [state for state, _ in states]
    assert State.DELIVERED in seen, "the cheat handed in while the command stayed"
    assert State.DISPUTED in seen
    assert buyer.seat is not None
    threads = buyer.seat.desk.threads
    assert deal not in threads or buyer.seat.desk.was_shown(deal)
    said = " ".join(capsys.readouterr().err.split())
    assert f"until then the seller of deal {deal[:8]} may hand in its work" in said
    assert "Ctrl-C now can lose the 0.02" in said
    assert "the next coase command, such as coase status, goes on with it" in said
    await place.rest()
    assert place.earned(buyer) == 0


@pytest.mark.anyio
async def test_who_only_looks_stays_for_a_while_and_says_what_may_be_lost(
    place: Market, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(purchases, "QUIET_MAX_S", 0.2)
    buyer, deal = await cheated(place)
    with anyio.fail_after(60):
        await purchases._rest(place.node, buyer, quiet=True)
    assert not thread_of(buyer, deal).over
    purchases._say_open(place.node, buyer)
    said = " ".join(capsys.readouterr().err.split())
    assert f"the price of {deal[:8]} can be lost while no coase command runs" in said
