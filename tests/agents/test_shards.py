"""Which part of the market a request reaches: narrow first, wider while too few answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.agents import Agent, Job, Price
from coase.agents.wares import Summarise, Summary
from coase.protocol.subjects import LEVELS, prefixes
from tests.agents.market import SHORT, Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.steps import Notice

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


async def test_a_request_widens_until_somebody_offers_and_starts_there_next_time(
    place: Market,
) -> None:
    seller, buyer = Agent("seller"), Agent("buyer")

    @seller.offers("summarise", price=Price.per_task("0.02"), deliver_within=4, windows=SHORT)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return Summary(summary=task.text)

    await place.join(seller, buyer)
    assert buyer.buying is not None
    assert buyer.buying.start_level == 0, "a local market is small: everybody is asked at once"
    buyer.buying.start_level = LEVELS[-1]
    asked: list[tuple[int, str]] = []
    ask = place.node.transport.ask

    async def listen(capability: str, envelope: bytes, *, level: int, prefix: str) -> None:
        asked.append((level, prefix))
        await ask(capability, envelope, level=level, prefix=prefix)

    place.node.transport.ask = listen  # type: ignore[method-assign]
    threads: set[str] = set()

    def count(who: str, notice: Notice) -> None:
        if notice.kind == "said:offer":
            threads.add(notice.deal)

    place.node.runtime.observers.append(count)
    for number in range(2):
        await buyer.purchase(
            "summarise", Summarise(text=f"text {number}"), returns=Summary, max_price="0.05"
        )
    levels = [level for level, _ in asked]
    # Each shard that was asked in vain was followed by a wider one.
    assert levels == sorted(levels, reverse=True)
    met = prefixes(seller.address)
    assert (asked[-1][0], asked[-1][1]) in met
    assert all((level, prefix) not in met for level, prefix in asked[:-2])
    # However often it was asked, the seller made one thread of each request.
    assert len(threads) == 2
