"""Buyers and sellers that are killed while work is called for under rates, and paid as it comes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.escrow.backends.evm.channels import EvmChannels
from tests.live.actor import words
from tests.live.market import FUNDS_UNITS, Actor, Forge, Market, eventually, stream_wish, terms_of
from tests.live.test_crash import AT_ONCE, KILLED, Matrix
from tests.live.test_crash_streams import Streams, ended, moves

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

CALLS = 3  # At once.
WRITES_MAX = 44  # About what the purchase and the calls take; how many are one varies.
THREADS = "SELECT data FROM records WHERE kind = 'thread'"
KILLS = [
    ("buyer", "said:call"),  # It is on the disk, and not sent.
    ("buyer", "heard:chunk"),
    ("buyer", "said:voucher"),
    ("buyer", "heard:result"),
    ("seller", "heard:call"),  # It is not on the disk yet.
    ("seller", "said:chunk"),
    ("seller", "heard:voucher"),
    ("seller", "said:result"),
]


@dataclass
class Calls(Matrix):
    """Pairs of actors, one of which is killed in a call; both books have to agree afterwards."""

    async def cell(self, number: int, fates: dict[str, str], *, always: bool = True) -> None:
        """Let a buyer call several times at once, and let each side die as ``fates`` say."""
        ware, text = f"calls-{self.when}-{number}", f"text {number}"
        texts = [f"call {n} of {number}" for n in range(CALLS)]
        seller = self.actor(f"seller{number}", role="sell", wares=[], streams=[ware], **terms_of())
        wishes = [stream_wish(ware, text)]
        buyer = self.actor(f"buyer{number}", role="buy", wishes=wishes, calls=texts, budget="5")
        seller.start(fates.get("seller", ""))
        await seller.ready()
        buyer.start(fates.get("buyer", ""))

        def over() -> bool:
            for actor in (buyer, seller):
                if actor.lives[-1].code == KILLED:
                    assert len(actor.lives) == 1, "killed twice"
                    actor.start()
            if any(len(actor.said("ready")) < len(actor.lives) for actor in (buyer, seller)):
                return False
            return buyer.lives[-1].code not in (None, KILLED) and not Streams.open(seller)

        await eventually(over, f"the calls of {buyer.place.name} are over")
        await ended(buyer, seller)
        for actor, name in ((buyer, "buyer"), (seller, "seller")):
            killed = len(actor.lives) - 1
            assert killed == (name in fates) or not always, actor.said()
            assert not Streams.open(actor)
            self.crashed += killed
        self.require_all_there(buyer, texts)
        await self.require_even(buyer, seller, exact="buyer" not in fates)

    @staticmethod
    def require_all_there(buyer: Actor, texts: list[str]) -> None:
        """Return if each call was answered in whole, and paid as its purchase says."""
        assert not buyer.said("failed"), buyer.said()
        told = {row["deal"]: row for row in buyer.paid()}
        found = buyer.said("called")
        assert {line["called"] for line in found} == set(texts)
        for line in found:
            assert line["text"] == "".join(words(line["called"]))
            assert told[line["deal"]]["to_seller_units"] == line["units"]
            assert told[line["deal"]]["contract"]
        assert len({line["deal"] for line in found}) == len(found)

    async def require_even(self, buyer: Actor, seller: Actor, *, exact: bool) -> None:
        """Return if both journals, the purse and the chain agree on what was paid.

        Where the buyer was killed, it may have signed what it broke off before that was sent: the
        next voucher brings it, and then the seller has it in its channel and in no deal.
        """
        signed = moves(buyer, "VoucherPromised")
        totals = [int(row["total_units"]) for row in signed]
        paid = sum(int(row["units"]) for row in signed)
        assert totals == sorted(set(totals)), "a total was signed twice"
        assert totals[-1] == paid == int(moves(seller, "VoucherTaken")[-1]["total_units"])
        assert sum(row["to_seller_units"] for row in buyer.summaries()) == paid
        assert buyer.said("rested")[-1]["spent_units"] == paid
        got = sum(row["to_seller_units"] for row in seller.summaries())
        assert got == paid if exact else got <= paid
        for actor in (buyer, seller):
            rates = [row for row in actor.summaries() if row.get("rates")]
            assert rates, "no rates were agreed"
            ends = {(row["state"], row["to_seller_units"]) for row in rates}
            assert ends <= {("lapsed", 0), ("rejected", 0)}
            self.require_numbers_once(actor)
        async with self.live.settlement() as settlement:
            channels = await EvmChannels.beside(settlement, contract=self.live.network.channels)
            ((channel,),) = buyer.rows("SELECT deal FROM records WHERE kind = 'channel'")
            channel_id = bytes.fromhex(channel)
            view = (await channels.views([channel_id]))[channel_id]
            assert view.claimed_units <= paid <= view.balance_units
            address = await seller.address()
            has = await settlement.balance(address) + await channels.unpaid(address)
            assert has == FUNDS_UNITS + view.claimed_units
            left = await settlement.balance(await buyer.address())
            assert left == FUNDS_UNITS - view.balance_units

    @staticmethod
    def require_numbers_once(actor: Actor) -> None:
        """Return if no number of a contract has begun two deals."""
        opened = [json.loads(row[0]) for row in actor.rows(THREADS)]
        named = [tuple(row["called"][:2]) for row in opened if "called" in row]
        assert len(named) >= CALLS
        assert len(set(named)) == len(named)


async def test_killed_in_a_call_both_books_agree_to_the_unit(
    live: Market, forge: Forge, tmp_path: Path
) -> None:
    matrix = Calls(live, forge, tmp_path, "some")
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            group.start_soon(matrix.cell, 0, {"buyer": "called:said:voucher"})
            group.start_soon(matrix.cell, 1, {"seller": "called:heard:call"})


@pytest.mark.slow
async def test_killed_at_any_time_of_a_call_both_books_agree(
    live: Market, forge: Forge, tmp_path: Path
) -> None:
    matrix = Calls(live, forge, tmp_path, "all")
    with anyio.fail_after(550):
        async with anyio.create_task_group() as group:
            for number, (who, kind) in enumerate(KILLS):
                group.start_soon(matrix.cell, number, {who: f"called:{kind}"})
            both = {"buyer": "called:said:voucher", "seller": "called:heard:voucher"}
            group.start_soon(matrix.cell, len(KILLS), both)
    assert matrix.crashed == len(KILLS) + 2


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("who", ["buyer", "seller"])
async def test_killed_at_a_write_of_calls_both_books_agree(
    live: Market, forge: Forge, tmp_path: Path, when: str, who: str
) -> None:
    matrix = Calls(live, forge, tmp_path, f"{when}-{who}")
    limit = anyio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with limit:
            await matrix.cell(number, {who: f"{when}:{number}"}, always=False)

    with anyio.fail_after(550):
        async with anyio.create_task_group() as group:
            for number in range(2, WRITES_MAX, 2):
                group.start_soon(one, number)
    assert matrix.crashed > 5
