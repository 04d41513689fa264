"""Buyers and sellers that are killed at every write of a real deal, and carry on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.live.market import (
    FUNDS_UNITS,
    PRICE_UNITS,
    Actor,
    Forge,
    Market,
    eventually,
    terms_of,
    wish,
)

if TYPE_CHECKING:
    from pathlib import Path

AT_ONCE = 6  # Cells that run at one time, on two cores.
CRASHES_MAX = 60  # A deal has about ten commits on each side.
KILLED = -9
LATE = [pytest.param(when, marks=pytest.mark.slow) for when in ("acted", "before")]

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@dataclass
class Matrix:
    """The cells of one matrix: the n-th is killed at its n-th commit, if it gets that far."""

    live: Market
    forge: Forge
    place: Path
    when: str
    crashed: int = 0
    finished: int = 0

    async def run(self, cell: str) -> None:
        """Run the cells, until some got through without having been killed."""
        limit = anyio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            try:
                crashed = await getattr(self, cell)(number)
            finally:
                limit.release()
            self.crashed += crashed
            self.finished += not crashed

        async with anyio.create_task_group() as group:
            for number in range(1, CRASHES_MAX):
                await limit.acquire()
                if self.finished:
                    break
                group.start_soon(one, number)
        assert self.finished, "each cell was killed: the matrix ends too early"
        assert self.crashed >= 6, "the deal was made in fewer commits than it can have"

    def actor(self, name: str, **orders: object) -> Actor:
        return Actor(self.forge, self.live, self.place / name, **orders)

    async def buyer(self, number: int) -> bool:
        """A buyer is killed; return whether it was."""
        buyer = self.actor(
            f"buyer{number}", role="buy", wishes=[wish("echo-buyers", f"text {number}")]
        )
        buyer.start(f"{self.when}:{number}")
        code = await buyer.end()
        if code == KILLED:
            buyer.start()
            code = await buyer.end()
        assert code == 0, buyer.errors()
        await self.require_one_deal(buyer, f"text {number}")
        return len(buyer.lives) == 2

    async def seller(self, number: int) -> bool:
        """A seller is killed; return whether it was."""
        ware = f"echo-{self.when}-{number}"
        seller = self.actor(f"seller{number}", role="sell", wares=[ware], **terms_of())
        seller.start(f"{self.when}:{number}")
        address = await seller.ready()
        buyer = self.actor(f"buyer{number}", role="buy", wishes=[wish(ware, f"text {number}")])
        life = buyer.start()

        def over() -> bool:
            if seller.lives[-1].code == KILLED:
                assert len(seller.lives) == 1, "killed twice"
                seller.start()
            if len(seller.said("ready")) < len(seller.lives):
                return False
            return life.code is not None and not seller.open_deals()

        await eventually(over, f"the deal of seller {number} is over")
        assert life.code == 0, buyer.errors()
        code = await seller.stop()
        if code == KILLED and len(seller.lives) == 1:  # By its very last commit.
            seller.start()
            await seller.ready()
            code = await seller.stop()
        assert code == 0, seller.errors()
        await self.require_one_deal(buyer, f"text {number}")
        (paid,) = seller.paid()
        assert (paid["state"], paid["to_seller_units"]) == ("settled", PRICE_UNITS)
        async with self.live.settlement() as settlement:
            assert await settlement.balance(address) == FUNDS_UNITS + PRICE_UNITS
        return len(seller.lives) == 2

    async def require_one_deal(self, buyer: Actor, text: str) -> None:
        """Return if exactly one deal was paid, its result came, and nothing is left open."""
        said = buyer.said()
        bought = [line for line in said if "bought" in line]
        assert {line["text"] for line in bought} == {text}, (said, buyer.errors())
        assert len({line["deal"] for line in bought}) == 1
        assert not buyer.said("failed")
        assert buyer.open_deals() == []
        (paid,) = buyer.paid()
        assert paid["deal"] == bought[0]["deal"]
        assert (paid["state"], paid["to_seller_units"]) == ("settled", PRICE_UNITS)
        assert all(row["state"] in ("lapsed", "rejected", "settled") for row in buyer.summaries())
        async with self.live.settlement() as settlement:
            assert await settlement.balance(await buyer.address()) == FUNDS_UNITS - PRICE_UNITS


@pytest.mark.parametrize("when", ["after", *LATE])
async def test_a_buyer_killed_at_any_write(
    live: Market, forge: Forge, tmp_path: Path, when: str
) -> None:
    matrix = Matrix(live, forge, tmp_path, when)
    seller = matrix.actor("seller", role="sell", wares=["echo-buyers"], **terms_of())
    seller.start()
    address = await seller.ready()

    await matrix.run("buyer")

    await eventually(lambda: not seller.open_deals(), "the seller has no open deal")
    assert await seller.stop() == 0, seller.errors()
    cells = matrix.crashed + matrix.finished
    assert len({row["counterparty"] for row in seller.paid()}) == len(seller.paid()) == cells
    async with live.settlement() as settlement:
        assert await settlement.balance(address) == FUNDS_UNITS + cells * PRICE_UNITS
        assert await settlement.held() == 0


@pytest.mark.parametrize("when", ["after", *LATE])
async def test_a_seller_killed_at_any_write(
    live: Market, forge: Forge, tmp_path: Path, when: str
) -> None:
    matrix = Matrix(live, forge, tmp_path, when)
    await matrix.run("seller")
    async with live.settlement() as settlement:
        assert await settlement.held() == 0
