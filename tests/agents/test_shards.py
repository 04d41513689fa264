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
    seconds_from = 0
    for number in range(2):
        seconds_from = len(asked)
        await buyer.purchase(
            "summarise", Summarise(text=f"text {number}"), returns=Summary, max_price="0.05"
        )
    met = prefixes(seller.address)
    # Each shard that was asked in vain was followed by a wider one, until one held the seller;
    # an offer that takes longer than usual has the last shard asked once more.
    first = next(number for number, shard in enumerate(asked) if shard in met)
    narrow, level = asked[:first], asked[first][0]
    assert [level for level, _ in narrow] == [
        wide for wide in sorted(LEVELS, reverse=True) if wide > level
    ]
    assert all(wider <= level for wider, _ in asked[first:])
    # The next request starts where the last one ended.
    assert asked[seconds_from][0] == asked[seconds_from - 1][0]
    # However often it was asked, the seller made one thread of each request.
    assert len(threads) == 2
