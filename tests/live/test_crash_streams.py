"""Buyers and sellers that are killed at every write of a deal that is paid while it is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.escrow.backends.evm.channels import EvmChannels
from tests.live.actor import words
from tests.live.market import FUNDS_UNITS, Actor, Forge, Market, eventually, stream_wish, terms_of
from tests.live.test_crash import KILLED, LATE, Matrix

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
WHEN = [pytest.param("after", marks=pytest.mark.slow), *LATE]


def moves(actor: Actor, kind: str) -> list[dict[str, Any]]:
    """Return what an actor's journal says of its channels."""
    rows = actor.rows("SELECT data FROM records WHERE kind = 'voucher' ORDER BY seq")
    told = [json.loads(row[0]) for row in rows]
    return [row for row in told if row["kind"] == kind]


async def ended(buyer: Actor, seller: Actor) -> None:
    """Return once both have ended well, the seller because it is told to."""
    assert buyer.lives[-1].code == 0, buyer.errors()
    if await seller.stop() == KILLED:  # By its very last commit.
        seller.start()
        await seller.ready()
        await seller.stop()
    assert seller.lives[-1].code == 0, seller.errors()


async def require_even(live: Market, buyer: Actor, seller: Actor) -> int:
    """Return what was paid, if both journals and the chain agree on it to the unit."""
    signed = moves(buyer, "VoucherPromised")
    totals = [int(row["total_units"]) for row in signed]
    paid = sum(int(row["units"]) for row in signed)
    assert totals == sorted(set(totals)), "a total was signed twice"
    assert totals[-1] == paid == int(moves(seller, "VoucherTaken")[-1]["total_units"])
    for actor in (buyer, seller):
        assert sum(row["to_seller_units"] for row in actor.paid()) == paid
    ((channel, row),) = buyer.rows("SELECT deal, data FROM records WHERE kind = 'channel'")
    assert json.loads(row)["side"] == "buyer"
    ended = buyer.rows("SELECT count(*) FROM records WHERE kind = 'deposited'")
    assert ended == [(1,)], "one deposit, and it was seen through"
    async with live.settlement() as settlement:
        channels = await EvmChannels.beside(settlement, contract=live.network.channels)
        channel_id = bytes.fromhex(channel)
        view = (await channels.views([channel_id]))[channel_id]
        assert view.claimed_units in (0, paid)
        address = await seller.address()
        got = await settlement.balance(address) + await channels.unpaid(address)
        assert got == FUNDS_UNITS + view.claimed_units
        assert await settlement.balance(await buyer.address()) == FUNDS_UNITS - view.balance_units
        assert view.balance_units > paid
    return paid


@dataclass
class Streams(Matrix):
    """The cells of a matrix of streamed deals: a pair of actors each."""

    def pair(self, number: int) -> tuple[Actor, Actor]:
        """Return the buyer and the seller of one cell."""
        ware, text = f"write-{self.when}-{number}", f"text {number}"
        seller = self.actor(f"seller{number}", role="sell", wares=[], streams=[ware], **terms_of())
        buyer = self.actor(f"buyer{number}", role="buy", wishes=[stream_wish(ware, text)])
        return buyer, seller

    async def buyer(self, number: int) -> bool:
        """A buyer is killed; return whether it was."""
        buyer, seller = self.pair(number)
        seller.start()
        await seller.ready()
        buyer.start(f"{self.when}:{number}")
        await self.see_through(buyer, seller)
        return len(buyer.lives) == 2

    async def seller(self, number: int) -> bool:
        """A seller is killed; return whether it was."""
        buyer, seller = self.pair(number)
        seller.start(f"{self.when}:{number}")
        await seller.ready()
        buyer.start()
        await self.see_through(buyer, seller)
        return len(seller.lives) == 2

    async def see_through(self, buyer: Actor, seller: Actor) -> None:
        """Start again whoever was killed, until the deal is over; then compare all books."""

        def over() -> bool:
            for actor in (buyer, seller):
                if actor.lives[-1].code == KILLED:
                    assert len(actor.lives) == 1, "killed twice"
                    actor.start()
            return buyer.lives[-1].code is not None and not self.open(seller)

        await eventually(over, f"the deal of {buyer.place.name} is over")
        await ended(buyer, seller)
        texts = {line["text"] for line in buyer.said("bought")}
        assert len(texts) == 1, (buyer.said(), buyer.errors())
        (text,) = texts
        assert text == "".join(words(text.partition(",")[0]))
        for actor in (buyer, seller):
            (paid,) = actor.paid()
            assert paid["state"] == "settled"
            assert not self.open(actor)
        await require_even(self.live, buyer, seller)

    @staticmethod
    def open(actor: Actor) -> list[str]:
        """Return the deals that an actor's journal would replay; its channels stay."""
        rows = actor.rows(
            "SELECT DISTINCT deal FROM records WHERE open = 1 AND kind NOT IN"
            " ('channel', 'voucher', 'deposit', 'deposited')"
        )
        return [row[0] for row in rows]


async def test_both_killed_in_mid_stream_go_on_from_what_was_paid(
    live: Market, forge: Forge, tmp_path: Path
) -> None:
    cell = Streams(live, forge, tmp_path, "once")
    buyer, seller = cell.pair(0)
    seller.start("notice:heard:voucher")
    await seller.ready()
    buyer.start("notice:said:voucher")
    await cell.see_through(buyer, seller)
    assert len(buyer.lives) == len(seller.lives) == 2
    # One before the kill and one after it; how many more depends on who is back first.
    assert len(moves(buyer, "VoucherPromised")) > 1
    assert {row["kind"] for row in [*moves(seller, "ChunkSent"), *moves(seller, "StreamEnded")]}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("who", ["buyer", "seller"])
async def test_one_killed_at_any_write_of_a_stream(
    live: Market, forge: Forge, tmp_path: Path, when: str, who: str
) -> None:
    matrix = Streams(live, forge, tmp_path, when)
    with anyio.fail_after(880):
        await matrix.run(who)
    assert matrix.crashed > 10
